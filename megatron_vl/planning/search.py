"""Find the layouts of a run that fit a number of GPUs, and order them by their time.

Every combination of tensor size (up to 8 and within a node), pipeline size, virtual size, place of the vision part,
micro-batch size, recomputation and optimizer sharding is a ``RunConfig``. ``config/validate.py`` and ``layout.py`` say
which are valid, ``memory.py`` which fit, ``step_time.py`` how long a step takes. A field that the user has given on the
command line keeps its value.

A *family* is the combinations with the same tensor size, pipeline size, recomputation and place of the vision part. The
plans that are shown are the best of their families, since neighbors within a family differ little. Only combinations
whose lower bound may still be among the best are simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_vl.config.batch import data_parallel_size, num_microbatches, with_rows
from megatron_vl.config.load import Overrides
from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.validate import validate
from megatron_vl.errors import ConfigError
from megatron_vl.planning.gpus import GPUS
from megatron_vl.planning.hosts import Hosts
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Layout, rank_memories
from megatron_vl.planning.plans import Answer, Candidate, Family, Plan, Question
from megatron_vl.planning.step_time import fastest_possible, step_time

_TENSOR, _PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
_VIRTUAL, _SEQUENCE = "parallel.virtual_pipeline_model_parallel_size", "parallel.sequence_parallel"
_SHARDED, _RECOMPUTE = "parallel.use_distributed_optimizer", "training.recompute_granularity"
_MICRO, _VISION = "training.micro_batch_size", "parallel.vision_parallel"
_USUAL_VISION: Mapping[str, int | str | None] = {
    "parallel.vision_micro_batch_size": ParallelConfig().vision_micro_batch_size,
    "parallel.vision_recompute": ParallelConfig().vision_recompute,
}
"""What has no effect where stages hold the vision part, and is refused there."""
_OVERLAP_REDUCE, _OVERLAP_GATHER = "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"
_TENSOR_SIZES, _MICRO_BATCHES, _VIRTUAL_SIZES = (1, 2, 4, 8), (1, 2, 4, 8), (None, 2, 3, 4)
_RECOMPUTATIONS = (None, "selective", "full")
NUM_SHOWN = 5


def search(question: Question) -> Answer:
    """Return the best plans.

    Raises:
        ConfigError: if no combination is valid, or none fits; with the arithmetic and what would help.
    """
    survey = _Survey(question)
    survey.look()
    if not survey.valid:
        lines = "\n".join(f"  {line}" for line in survey.invalid)
        raise ConfigError(f"no layout of {question.num_gpus} GPUs is valid for this run:\n{lines}")
    fitting = [one for one in survey.valid if one.fullest.total <= question.limit]
    if not fitting:
        raise ConfigError(_nothing_fits(question, survey.valid))
    return Answer(
        plans=tuple(_best(question, fitting)),
        rejected=(*survey.invalid, *_too_large(question, survey.valid)),
        num_valid=len(survey.valid),
        num_fitting=len(fitting),
        num_fitting_families=len({one.family for one in fitting}),
    )


def describe(question: Question, config: RunConfig) -> Candidate:
    """Return one combination with its memory, whether it fits or not; raises ``ConfigError`` if it is not valid."""
    counted = _counted(question, config)
    layout = Layout.of(counted, resolve_layout(counted))
    return _candidate(question, counted, layout)


@dataclass
class _Survey:
    """All combinations of a question."""

    question: Question
    valid: list[Candidate] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    """Why no combination of a tensor size, a pipeline size and a place of the vision part is valid."""

    def look(self) -> None:
        """Try every combination."""
        for tensor in self._options(_TENSOR, _TENSOR_SIZES):
            for pipeline in self._pipelines(int(tensor or 1)):
                sizes = int(tensor or 1), int(pipeline or 1)
                # On one rank nothing is gained by taking the vision part out of its stage.
                places = ("pipeline", "data") if sizes != (1, 1) else ("pipeline",)
                whys = {str(place): self._look_for(*sizes, str(place)) for place in self._options(_VISION, places)}
                self.invalid += _in_words(f"tensor {tensor}, pipeline {pipeline}", whys)

    def _look_for(self, tensor: int, pipeline: int, place: str) -> str | None:
        """Add the valid combinations with the vision part in this place; return why there is none."""
        gpus, gpu = self.question.num_gpus, self.question.gpu
        hosts = Hosts(tensor, gpus // tensor, 1, gpu.within(gpus).nvlink_domain)
        if (group := hosts.split_tensor_group) is not None:
            return (
                f"the tensor-parallel ranks {group[0]} to {group[-1]} are not on one host: NVLink connects "
                f"{hosts.per_host} GPUs, and tensor parallelism over the network is not planned"
            )
        why: list[str] = []
        before = len(self.valid)
        sizes: dict[str, int | str | None] = {_TENSOR: tensor, _PIPELINE: pipeline, _VISION: place}
        if place == "pipeline" and _VISION not in self.question.fixed:
            sizes |= _USUAL_VISION
        for virtual in self._virtual(pipeline, place):
            self._look_at(sizes | self._sequence(tensor, place) | {_VIRTUAL: virtual}, why)
        return why[0] if len(self.valid) == before else None

    def _look_at(self, sizes: Overrides, why: list[str]) -> None:
        """Add the valid combinations of these sizes; or what is wrong with the first one."""
        question = self.question
        layout = None
        for micro in self._options(_MICRO, _MICRO_BATCHES):
            try:
                config = _counted(question, _exposed(question, _applied(question.config, {**sizes, _MICRO: micro})))
                layout = layout or Layout.of(config, resolve_layout(config))
            except ConfigError as error:
                why.append(str(error))
                continue
            for recompute in self._options(_RECOMPUTE, _RECOMPUTATIONS):
                self.valid += self._with_and_without_sharding(config, layout, {_RECOMPUTE: recompute})

    def _with_and_without_sharding(self, config: RunConfig, layout: Layout, values: Overrides) -> Iterator[Candidate]:
        known: Candidate | None = None
        for sharded in self._options(_SHARDED, (True, False)):
            if _gathers(self.question) and not sharded:
                continue  # then there is nothing to gather
            detailed = _overlapped(self.question, config, {**values, _SHARDED: sharded})
            known = _candidate(self.question, detailed, layout) if known is None else known.at(detailed)
            yield known

    def _pipelines(self, tensor: int) -> Sequence[int | str | None]:
        rest = self.question.num_gpus // tensor
        longest = min(rest, self._num_units("pipeline"))
        sizes = [size for size in range(1, longest + 1) if self.question.num_gpus % (tensor * size) == 0]
        return self._options(_PIPELINE, sizes or (1,))

    def _virtual(self, pipeline: int, place: str) -> Sequence[int | str | None]:
        longest = self._num_units(place)
        sizes = [size for size in _VIRTUAL_SIZES if size is None or (pipeline > 1 and pipeline * size <= longest)]
        return self._options(_VIRTUAL, sizes)

    def _num_units(self, place: str) -> int:
        """Return the units that are cut, which is the largest number of stages."""
        model = self.question.config.model
        vision = model.vision.num_layers + 1 if place == "pipeline" else 0
        return vision + model.language.num_layers + 1

    def _sequence(self, tensor: int, place: str) -> dict[str, int | str | None]:
        """Divide the sequence wherever that is possible: it costs no traffic and saves memory."""
        model, parallel = self.question.config.model, self.question.config.parallel
        if _SEQUENCE in self.question.fixed:
            return {_SEQUENCE: parallel.sequence_parallel}
        sizes = [self.question.config.data.seq_length] + ([model.num_patches] if place == "pipeline" else [])
        return {_SEQUENCE: tensor > 1 and all(size % tensor == 0 for size in sizes)}

    def _options(self, name: str, options: Sequence[int | str | None]) -> Sequence[int | str | None]:
        """Return the values that are tried of a field: those of the search, or the one that the user has given."""
        if name not in self.question.fixed:
            if name == _TENSOR:
                return [size for size in options if self.question.num_gpus % int(size or 1) == 0]
            return options
        section, leaf = name.split(".")
        value: int | str | None = getattr(getattr(self.question.config, section), leaf)
        return (value,)


def _counted(question: Question, config: RunConfig) -> RunConfig:
    """Return a valid configuration with its batch in rows; raises ``ConfigError`` if it is not valid."""
    counted = with_rows(config, question.row.samples, question.num_gpus)
    validate(counted, world_size=question.num_gpus, cuda=True)
    samples = config.training.global_batch_samples
    if samples is not None:
        rows = counted.training.global_batch_size
        off = rows * question.row.samples / samples - 1
        if abs(off) > question.tolerance + 1e-9:
            data = data_parallel_size(config.parallel, question.num_gpus)
            raise ConfigError(
                f"the nearest step that divides over data {data} x micro-batch {config.training.micro_batch_size} is "
                f"{rows} rows x {question.row.samples:g} samples = {rows * question.row.samples:,.0f}, which is "
                f"{off:+.0%} of the recipe's {samples:,}; {question.tolerance:.0%} are allowed (--batch-tolerance)"
            )
    return counted


def _gathers(question: Question) -> bool:
    """Return whether the user has asked for ``overlap_param_gather``."""
    return _OVERLAP_GATHER in question.fixed and question.config.parallel.overlap_param_gather


def _exposed(question: Question, config: RunConfig) -> RunConfig:
    """Return ``config`` without hiding the data-parallel exchange, where the user leaves that to the search.

    It is decided for each combination (:func:`_overlapped`). So no combination is refused for what the recipe says.
    """
    overlap = dict.fromkeys((_OVERLAP_REDUCE, _OVERLAP_GATHER), _gathers(question))
    return _applied(config, {name: value for name, value in overlap.items() if name not in question.fixed})


def _overlapped(question: Question, config: RunConfig, values: Overrides) -> RunConfig:
    """Return ``config`` with ``values``, and with the data-parallel exchange hidden where it can be."""
    many = data_parallel_size(config.parallel, question.num_gpus) > 1
    reduces = many or _gathers(question)
    if _OVERLAP_REDUCE in question.fixed:
        reduces = config.parallel.overlap_grad_reduce
    overlap = {_OVERLAP_REDUCE: reduces, _OVERLAP_GATHER: many and reduces and bool(values[_SHARDED])}
    free = {name: value for name, value in overlap.items() if name not in question.fixed}
    return _applied(config, {**values, **free})


def _in_words(name: str, whys: Mapping[str, str | None]) -> list[str]:
    """Return a line for each place of the vision part that has no valid combination, or one for all of them."""
    reasons = {place: why for place, why in whys.items() if why is not None}
    if len(reasons) == len(whys) and len(set(reasons.values())) == 1:
        return [f"{name}: {next(iter(reasons.values()))}"]
    called = {"pipeline": "vision part in stages", "data": "vision part on every rank"}
    return [f"{name}, {called[place]}: {why}" for place, why in reasons.items()]


def _applied(config: RunConfig, values: Overrides) -> RunConfig:
    """Return ``config`` with values of its parallel and training sections."""

    def of(section: str) -> dict[str, Any]:
        return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}

    parallel, training = replace(config.parallel, **of("parallel")), replace(config.training, **of("training"))
    return replace(config, parallel=parallel, training=training)


def _candidate(question: Question, config: RunConfig, layout: Layout) -> Candidate:
    data_parallel = data_parallel_size(config.parallel, question.num_gpus)
    micro_batches = num_microbatches(config.training, data_parallel)
    work = question.row.computed(config)
    memory = rank_memories(config, layout, work, world_size=question.num_gpus, micro_batches=micro_batches)
    return Candidate(config, layout, memory, question.num_gpus)


def _best(question: Question, fitting: Sequence[Candidate]) -> list[Plan]:
    """Return the best plan of each of the best families."""
    gpu, row, count = question.gpu, question.row, question.num_gpus

    bounds: dict[tuple[int, TrainingConfig, bool], float] = {}

    def bound(one: Candidate) -> float:
        key = (id(one.layout), one.config.training, one.config.parallel.sequence_parallel)
        if key not in bounds:  # sharding the optimizer does not change what ranks compute
            least = fastest_possible(one.config, one.layout, row, gpu, count)
            bounds[key] = least / one.config.training.global_batch_size
        return bounds[key]

    best: dict[Family, Plan] = {}
    for least, _, one in sorted((bound(one), number, one) for number, one in enumerate(fitting)):
        ranked = sorted(best.values(), key=_rank)[:NUM_SHOWN]
        if len(ranked) == NUM_SHOWN and least > ranked[-1].seconds_per_row:
            break
        known = best.get(one.family)
        if known is not None and least > known.seconds_per_row:
            continue
        plan = Plan(one, step_time(one.config, one.layout, row, gpu, count), gpu)
        if known is None or _rank(plan) < _rank(known):
            best[one.family] = plan
    return sorted(best.values(), key=_rank)[:NUM_SHOWN]


def _rank(plan: Plan) -> tuple[float, float]:
    """Order plans by time; among those that differ by less than a thousandth, by memory."""
    return float(f"{plan.seconds_per_row:.3g}"), plan.candidate.fullest.total


def _too_large(question: Question, valid: Sequence[Candidate]) -> list[str]:
    """Return a line for each family of which nothing fits."""
    smallest: dict[Family, float] = {}
    for one in valid:
        smallest[one.family] = min(one.fullest.total, smallest.get(one.family, float("inf")))
    gpu = question.gpu
    return [
        f"{family}: {size / 1e9:.1f} GB on the fullest rank > {gpu.memory / 1e9:.0f} GB x {question.usable:g}"
        for family, size in smallest.items()
        if size > question.limit
    ]


def _nothing_fits(question: Question, valid: Sequence[Candidate]) -> str:
    one = min(valid, key=lambda candidate: candidate.fullest.total)
    needed, gpu, config = one.fullest.total, question.gpu, one.config
    larger = [gpu.name for gpu in GPUS.values() if question.usable * gpu.memory >= needed]
    helps = [f"--gpu {' or '.join(larger)}"] if larger else []
    helps.append("more --gpus, which split the model or the optimizer further")
    if not one.family.recomputes_all:
        helps.append("--recompute-granularity full")
    return (
        f"nothing fits {question.num_gpus} x {gpu.name}: the smallest need is {needed / 1e9:.1f} GB on the fullest "
        f"rank ({one.family}, micro-batch {config.training.micro_batch_size}), and {gpu.memory / 1e9:.0f} GB x "
        f"{question.usable:g} = {question.limit / 1e9:.1f} GB are usable. What helps: {'; '.join(helps)}"
    )
