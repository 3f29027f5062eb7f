"""List the combinations of a run's layout that are valid, with the memory of each.

Every combination of tensor size (up to 8 and within a host), pipeline size, virtual size, place of the vision part,
micro-batch size, recomputation and optimizer sharding is a ``RunConfig``. ``config/validate.py`` and ``layout.py`` say
which are valid, ``memory.py`` what each needs. A field that the user has given on the command line keeps its value.

Three choices are made inside a combination, since they do not depend on the others:

* sequence parallelism wherever it is valid. It costs no traffic and saves memory;
* the exchange of data-parallel ranks is hidden where it can be;
* where every rank holds the vision part: how many images it encodes at a time, and which of their activations it keeps.
  The fastest choice that fits is taken, or the smallest if none fits. The rest of the step is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from megatron_vl.config.batch import data_parallel_size, num_microbatches, with_rows
from megatron_vl.config.fields import Value
from megatron_vl.config.load import Overrides
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.errors import ConfigError
from megatron_vl.planning.hosts import Hosts
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Layout, RankMemory, rank_memories, schedule_memories, state_bytes, with_vision
from megatron_vl.planning.plans import Candidate, Question, in_thousandths
from megatron_vl.planning.vision_share import VisionShare

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VIRTUAL, LAYOUT = "parallel.virtual_pipeline_model_parallel_size", "parallel.pipeline_layout"
SHARDED, RECOMPUTE = "parallel.use_distributed_optimizer", "training.recompute_granularity"
MICRO, VISION = "training.micro_batch_size", "parallel.vision_parallel"
VISION_MICRO, VISION_RECOMPUTE = "parallel.vision_micro_batch_size", "parallel.vision_recompute"
VISION_GRANULARITY = "parallel.vision_recompute_granularity"
SEQUENCE = "parallel.sequence_parallel"
_OVERLAP_REDUCE, _OVERLAP_GATHER = "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"
_USUAL_VISION: Overrides = {
    VISION_MICRO: ParallelConfig().vision_micro_batch_size,
    VISION_RECOMPUTE: ParallelConfig().vision_recompute,
    VISION_GRANULARITY: ParallelConfig().vision_recompute_granularity,
}
"""What has no effect where stages hold the vision part, and is refused there."""
_TENSOR_SIZES, _MICRO_BATCHES, _VIRTUAL_SIZES = (1, 2, 4, 8), (1, 2, 4, 8), (None, 2, 3, 4)
_RECOMPUTATIONS, _IMAGES_AT_A_TIME = (None, "selective", "full"), (8, 1, 2, 4, 16, 32)
"""Of choices that cost the same, the first is taken: of the images, the usual number."""


def describe(question: Question, config: RunConfig) -> Candidate:
    """Return one combination with its memory, whether it fits or not; raises ``ConfigError`` if it is not valid."""
    counted = _counted(question, config)
    layout = Layout.of(counted, resolve_layout(counted))
    data_parallel = data_parallel_size(counted.parallel, question.num_gpus)
    memory = rank_memories(
        counted,
        layout,
        question.row.computed(counted),
        world_size=question.num_gpus,
        micro_batches=num_microbatches(counted.training, data_parallel),
    )
    return Candidate(counted, layout, memory, question.num_gpus)


@dataclass
class Survey:
    """All combinations of a question."""

    question: Question
    valid: list[Candidate] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    """Why no combination of a tensor size, a pipeline size and a place of the vision part is valid."""
    _encoders: dict[tuple[float, str | None], list[Overrides]] = field(default_factory=dict)
    """How a rank encodes its images, the fastest way first; by their number and ``recompute_granularity``."""

    def look(self) -> None:
        """Try every combination."""
        for tensor in self._options(TENSOR, _TENSOR_SIZES):
            for pipeline in self._pipelines(int(tensor or 1)):
                sizes = int(tensor or 1), int(pipeline or 1)
                # On one rank nothing is gained by taking the vision part out of its stage.
                places = ("pipeline", "data") if sizes != (1, 1) else ("pipeline",)
                whys = {str(place): self._look_for(*sizes, str(place)) for place in self._options(VISION, places)}
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
        sizes: dict[str, Value] = {TENSOR: tensor, PIPELINE: pipeline, VISION: place}
        if place == "pipeline" and VISION not in self.question.fixed:
            sizes |= _USUAL_VISION
        for virtual in self._virtual(pipeline, place):
            self._look_at(sizes | {VIRTUAL: virtual}, self._sequence(tensor), why)
        return why[0] if len(self.valid) == before else None

    def _look_at(self, sizes: Overrides, sequence: Sequence[bool], why: list[str]) -> None:
        """Add the valid combinations of these sizes; or what is wrong with each micro-batch size."""
        layout = None
        for micro in self._options(MICRO, _MICRO_BATCHES):
            try:
                config = self._first_valid({**sizes, MICRO: micro}, sequence)
                layout = layout or Layout.of(config, resolve_layout(config))
            except ConfigError as error:
                why.append(str(error))
                continue
            for recompute in self._options(RECOMPUTE, _RECOMPUTATIONS):
                self.valid += self._with_and_without_sharding(config, layout, {RECOMPUTE: recompute})

    def _first_valid(self, values: Overrides, sequence: Sequence[bool]) -> RunConfig:
        """Return the configuration with the first of these choices of sequence parallelism that is valid.

        Raises:
            ConfigError: if none is; says what is wrong with the last of them, plain tensor parallelism.
        """
        question = self.question
        *better, last = (_exposed(question, applied(question.config, {**values, SEQUENCE: one})) for one in sequence)
        for config in better:
            try:
                return _counted(question, config)
            except ConfigError:
                continue
        return _counted(question, last)

    def _with_and_without_sharding(self, config: RunConfig, layout: Layout, values: Overrides) -> Iterator[Candidate]:
        question = self.question
        data_parallel = data_parallel_size(config.parallel, question.num_gpus)
        micro_batches = num_microbatches(config.training, data_parallel)
        work = question.row.computed(config)
        known: Sequence[RankMemory] | None = None
        for sharded in self._options(SHARDED, (True, False)):
            if _gathers(question) and not sharded:
                continue  # then there is nothing to gather
            detailed = _overlapped(question, config, {**values, SHARDED: sharded})
            if known is None:
                sizes = {"data_parallel": data_parallel, "micro_batches": micro_batches}
                known = schedule_memories(detailed, layout, work, **sizes)
            states = (state_bytes(detailed, rank, data_parallel, everywhere=layout.everywhere) for rank in layout.ranks)
            memory = tuple(replace(own, **state) for own, state in zip(known, states, strict=True))
            share = VisionShare.of(detailed, work, micro_batches, layout.everywhere)
            yield self._encoding(Candidate(detailed, layout, memory, question.num_gpus), share)

    def _encoding(self, candidate: Candidate, share: VisionShare | None) -> Candidate:
        """Return a combination with the fastest way to encode images that fits, or the smallest if none does."""
        if share is None:
            return candidate
        smallest = None
        for values in self._ways_to_encode(share):
            config = applied(candidate.config, values)
            own = replace(share, config=config)
            found = replace(candidate, config=config, memory=with_vision(candidate.memory, own))
            if found.fullest.total <= self.question.limit:
                return found
            if smallest is None or found.fullest.total < smallest.fullest.total:
                smallest = found
        assert smallest is not None
        return smallest

    def _ways_to_encode(self, share: VisionShare) -> list[Overrides]:
        """Return the choices of how a rank encodes its share, the fastest first, of equal ones the smallest."""
        key = share.images, share.config.training.recompute_granularity
        if key not in self._encoders:
            frozen = share.config.training.freeze_vision
            sizes = self._options(VISION_MICRO, _IMAGES_AT_A_TIME)
            again = self._options(VISION_RECOMPUTE, (True,) if frozen else (True, False))
            what = self._options(VISION_GRANULARITY, ("images",) if frozen else ("images", "layers"))
            ways: list[Overrides] = [
                {VISION_MICRO: size, VISION_RECOMPUTE: recompute, VISION_GRANULARITY: granularity}
                for recompute, granularity, size in product(again, what, sizes)
                if recompute or granularity == "images"
            ]

            def costs(way: Overrides) -> tuple[int, float]:
                own = replace(share, config=applied(share.config, way))
                return in_thousandths(own.seconds(self.question.gpu)), own.kept_bytes + sum(own.backward_bytes)

            self._encoders[key] = sorted(ways, key=costs)
        return self._encoders[key]

    def _pipelines(self, tensor: int) -> Sequence[int | str | None]:
        rest = self.question.num_gpus // tensor
        longest = min(rest, self._num_units("pipeline"))
        sizes = [size for size in range(1, longest + 1) if self.question.num_gpus % (tensor * size) == 0]
        return self._options(PIPELINE, sizes or (1,))

    def _virtual(self, pipeline: int, place: str) -> Sequence[int | str | None]:
        longest = self._num_units(place)
        sizes = [size for size in _VIRTUAL_SIZES if size is None or (pipeline > 1 and pipeline * size <= longest)]
        return self._options(VIRTUAL, sizes)

    def _num_units(self, place: str) -> int:
        """Return the units that are cut, which is the largest number of stages."""
        model = self.question.config.model
        vision = model.vision.num_layers + 1 if place == "pipeline" else 0
        return vision + model.language.num_layers + 1

    def _sequence(self, tensor: int) -> Sequence[bool]:
        """Return the choices of sequence parallelism, the better one first."""
        if SEQUENCE in self.question.fixed:
            return (self.question.config.parallel.sequence_parallel,)
        return (True, False) if tensor > 1 else (False,)

    def _options(self, name: str, options: Sequence[int | str | None]) -> Sequence[int | str | None]:
        """Return the values that are tried of a field: those of the search, or the one that the user has given."""
        if name not in self.question.fixed:
            if name == TENSOR:
                return [size for size in options if self.question.num_gpus % int(size or 1) == 0]
            return options
        section, leaf = name.split(".")
        value: int | str | None = getattr(getattr(self.question.config, section), leaf)
        return (value,)


def applied(config: RunConfig, values: Overrides) -> RunConfig:
    """Return ``config`` with values of its parallel and training sections."""

    def of(section: str) -> dict[str, Any]:
        return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}

    parallel, training = replace(config.parallel, **of("parallel")), replace(config.training, **of("training"))
    return replace(config, parallel=parallel, training=training)


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
    return applied(config, {name: value for name, value in overlap.items() if name not in question.fixed})


def _overlapped(question: Question, config: RunConfig, values: Overrides) -> RunConfig:
    """Return ``config`` with ``values``, and with the data-parallel exchange hidden where it can be."""
    many = data_parallel_size(config.parallel, question.num_gpus) > 1
    reduces = many or _gathers(question)
    if _OVERLAP_REDUCE in question.fixed:
        reduces = config.parallel.overlap_grad_reduce
    overlap = {_OVERLAP_REDUCE: reduces, _OVERLAP_GATHER: many and reduces and bool(values[SHARDED])}
    free = {name: value for name, value in overlap.items() if name not in question.fixed}
    return applied(config, {**values, **free})


def _in_words(name: str, whys: Mapping[str, str | None]) -> list[str]:
    """Return a line for each place of the vision part that has no valid combination, or one for all of them."""
    reasons = {place: why for place, why in whys.items() if why is not None}
    if len(reasons) == len(whys) and len(set(reasons.values())) == 1:
        return [f"{name}: {next(iter(reasons.values()))}"]
    called = {"pipeline": "vision part in stages", "data": "vision part on every rank"}
    return [f"{name}, {called[place]}: {why}" for place, why in reasons.items()]
