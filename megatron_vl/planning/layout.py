"""Assign layers to pipeline stages.

The model is a pipeline of units, ``V..V R L..L``: vision layers, the resampler, language layers. A layout splits it
into ``pipeline size x virtual size`` consecutive stages, anywhere: inside the vision tower, inside the language model,
before or after the resampler. The place of everything else follows from the split, so it is never written down. The
patch embedding is on the stage of the first V. The word embedding and the fusion of image features are on the stage of
the first L. The final norm and the output layer (the *head*) are on the last stage, which may hold nothing else.

Under ``vision_parallel data`` the line is the language model alone, ``L..L``: every rank holds :func:`vision_part` as
well, whole.

The written form lists the stages between bars, ``V*24|V*24R|L*16|L*16``. A layout that ends with a bar has a stage of
its own for the head. Virtual stage ``k`` is model chunk ``k // pp`` of pipeline rank ``k % pp``, as in Megatron-Core's
interleaved schedule. Invariant of every :class:`PipelineLayout`: the stages hold each unit once, in order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vl.config.schema import ModelConfig, RunConfig, VisionParallel
from megatron_vl.errors import ConfigError
from megatron_vl.planning.flops import FrozenParts, Work, unit_flops
from megatron_vl.planning.partition import balanced_partition

_KEY = "parallel.pipeline_layout"
_TERM = re.compile(r"([VRL])(?:\*(\d{1,5}))?")


@dataclass(frozen=True)
class StageLayout:
    """The units of one (virtual) stage; layer numbers are global and count from 0 in each tower."""

    vision_layers: range
    resampler: bool
    language_layers: range
    patch_embed: bool
    word_embedding: bool
    head: bool

    @property
    def units(self) -> str:
        """The stage in the written form, for example ``V*24R``; empty if it holds the head only."""
        return (
            _repeated("V", len(self.vision_layers))
            + ("R" if self.resampler else "")
            + _repeated("L", len(self.language_layers))
        )

    def __str__(self) -> str:
        """Return the units for people, with embeddings and head, for example ``word embedding, L 0-15``."""
        parts = ["patch embedding"] if self.patch_embed else []
        parts += _numbered("V", self.vision_layers)
        parts += ["resampler"] if self.resampler else []
        parts += ["word embedding"] if self.word_embedding else []
        parts += _numbered("L", self.language_layers)
        parts += ["head"] if self.head else []
        return ", ".join(parts)


@dataclass(frozen=True)
class PipelineLayout:
    """The stages of the pipeline in order, and the number of pipeline ranks that share them."""

    stages: tuple[StageLayout, ...]
    pipeline_size: int
    virtual_size: int = 1

    def __post_init__(self) -> None:
        assert len(self.stages) == self.pipeline_size * self.virtual_size

    @classmethod
    def whole(cls, model: ModelConfig) -> PipelineLayout:
        """Return the layout without a split: one stage holds the model."""
        line = _Line.of(model, "pipeline")
        return _build([line.size], line, 1, 1)

    def __str__(self) -> str:
        return "|".join(stage.units for stage in self.stages)

    def stage_index(self, pipeline_rank: int, chunk: int = 0) -> int:
        """Return the number of the virtual stage that is ``chunk`` of ``pipeline_rank``."""
        assert 0 <= pipeline_rank < self.pipeline_size and 0 <= chunk < self.virtual_size
        return chunk * self.pipeline_size + pipeline_rank

    def stage(self, pipeline_rank: int, chunk: int = 0) -> StageLayout:
        """Return the stage that is model chunk ``chunk`` of ``pipeline_rank``."""
        return self.stages[self.stage_index(pipeline_rank, chunk)]

    def stages_of_rank(self, pipeline_rank: int) -> tuple[StageLayout, ...]:
        """Return the stages of one pipeline rank, one for each model chunk."""
        return tuple(self.stage(pipeline_rank, chunk) for chunk in range(self.virtual_size))


@dataclass(frozen=True)
class _Line:
    """How many units of each kind are cut into stages."""

    vision: int
    resampler: int
    language: int

    @classmethod
    def of(cls, model: ModelConfig, vision_parallel: VisionParallel) -> _Line:
        if vision_parallel == "data":
            return cls(0, 0, model.language.num_layers)
        return cls(model.vision.num_layers, 1, model.language.num_layers)

    @property
    def size(self) -> int:
        return self.vision + self.resampler + self.language

    def __str__(self) -> str:
        parts = [(self.vision, "V"), (self.resampler, "R"), (self.language, "L")]
        return " + ".join(f"{count} {unit}" for count, unit in parts if count)


def vision_part(model: ModelConfig) -> StageLayout:
    """Return what every rank holds under ``vision_parallel data``, beside its stage of the language model."""
    return StageLayout(
        vision_layers=range(model.vision.num_layers),
        resampler=True,
        language_layers=range(0),
        patch_embed=True,
        word_embedding=False,
        head=False,
    )


def parse_layout(
    text: str,
    *,
    model: ModelConfig,
    pipeline_size: int,
    virtual_size: int = 1,
    vision_parallel: VisionParallel = "pipeline",
) -> PipelineLayout:
    """Read the written form of a layout.

    Raises:
        ConfigError: if the text has another form, or its units or stages are not those of the run; shows the
            arithmetic.
    """
    stages = "".join(text.split()).split("|")
    units = [_expand(stage, text) for stage in stages]
    line = _Line.of(model, vision_parallel)
    _check_order("".join(units), text)
    _check_counts(units, line, text)
    _check_stages(units, pipeline_size, virtual_size, text)
    return _build([len(stage) for stage in units], line, pipeline_size, virtual_size)


def resolve_layout(config: RunConfig) -> PipelineLayout:
    """Return the layout of a run: the one in the configuration, or for ``auto`` the balanced one.

    Raises:
        ConfigError: if the written layout does not fit the model and the parallel sizes.
    """
    parallel = config.parallel
    if parallel.pipeline_layout == "auto":
        return balanced_layout(config, assumed_work(config))
    return parse_layout(
        parallel.pipeline_layout,
        model=config.model,
        pipeline_size=parallel.pipeline_model_parallel_size,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
        vision_parallel=parallel.vision_parallel,
    )


def balanced_layout(config: RunConfig, work: Work) -> PipelineLayout:
    """Return the layout whose most expensive stage is as cheap as possible: exact, in FLOPs of forward and backward.

    Frozen parts count as frozen, so the split differs between the three recipe stages. Only the ratio of images to
    tokens of ``work`` matters.

    Raises:
        ConfigError: if there are more stages than units.
    """
    parallel = config.parallel
    pipeline_size, virtual_size = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    line = _Line.of(config.model, parallel.vision_parallel)
    costs = unit_flops(config.model, FrozenParts.of(config.training), work)[-line.size - 1 :]  # with the head
    num_stages = pipeline_size * virtual_size
    if num_stages > len(costs):
        raise ConfigError(
            f"{_KEY}: {_arithmetic(pipeline_size, virtual_size)}, "
            f"but the model has {len(costs)} units to cut: {line} + the head; use fewer pipeline stages"
        )
    sizes = balanced_partition(costs, num_stages)
    sizes[-1] -= 1  # the head is implied by being last
    return _build(sizes, line, pipeline_size, virtual_size)


def assumed_work(config: RunConfig) -> Work:
    """Return the row that ``auto`` balances for: images and their markers fill half of it; all text is supervised.

    At 2,048 tokens and 256 queries that is 4 images, the average of packed rows of the published recipes.
    """
    tokens = config.data.seq_length
    slots = config.model.resampler.num_queries + 2
    images = max(1, round(tokens / (2 * slots)))
    spans = images if config.data.attention_span == "segment" else 1
    return Work(
        num_images=images,
        num_tokens=tokens,
        sum_squared_spans=tokens * tokens // spans,
        num_supervised=max(0, tokens - images * slots),
    )


def _build(sizes: list[int], line: _Line, pipeline_size: int, virtual_size: int) -> PipelineLayout:
    """Return the layout whose stage i takes the next ``sizes[i]`` units."""
    first = line.vision + line.resampler  # the position of language layer 0 among the units
    stages, start = [], 0
    for number, size in enumerate(sizes):
        stop = start + size
        vision = range(min(start, line.vision), min(stop, line.vision))
        language = range(max(start - first, 0), max(stop - first, 0))
        stages.append(
            StageLayout(
                vision_layers=vision,
                resampler=line.resampler == 1 and start <= line.vision < stop,
                language_layers=language,
                patch_embed=line.resampler == 1 and start == 0,
                word_embedding=start <= first < stop,
                head=number == len(sizes) - 1,
            )
        )
        start = stop
    assert start == line.size
    return PipelineLayout(tuple(stages), pipeline_size, virtual_size)


def _repeated(unit: str, count: int) -> str:
    return "" if count == 0 else unit if count == 1 else f"{unit}*{count}"


def _numbered(unit: str, layers: range) -> list[str]:
    if not layers:
        return []
    return [f"{unit} {layers[0]}" if len(layers) == 1 else f"{unit} {layers[0]}-{layers[-1]}"]


def _expand(stage: str, text: str) -> str:
    """Expand ``V*2R`` to ``VVR``."""
    units, position = "", 0
    while position < len(stage):
        term = _TERM.match(stage, position)
        if term is None:
            raise ConfigError(
                f"{_KEY}: cannot read {stage[position:]!r} in {text!r}; "
                "expected V, R or L, each followed by *COUNT if repeated, with | between stages, "
                "for example 'V*24|V*24R|L*16|L*16'"
            )
        units += term[1] * int(term[2] or 1)
        position = term.end()
    return units


def _check_order(units: str, text: str) -> None:
    if re.fullmatch("V*R*L*", units) is None:
        raise ConfigError(
            f"{_KEY}: the units of {text!r} are out of order; "
            "the line is all vision layers V, the resampler R, then all language layers L"
        )


def _check_counts(units: list[str], line: _Line, text: str) -> None:
    expected = {"V": line.vision, "R": line.resampler, "L": line.language}
    names = {"V": "vision layers", "R": "resampler", "L": "language layers"}
    if line.vision == 0 and re.search("[VR]", text):
        raise ConfigError(
            f"{_KEY}: {text!r} cuts the vision tower, which parallel.vision_parallel data keeps whole on every rank; "
            f"cut the {line.language} L alone, or use 'auto'"
        )
    problems = []
    for unit, count in expected.items():
        found = [stage.count(unit) for stage in units if unit in stage]
        if sum(found) != count:
            terms = f" ({' + '.join(map(str, found))})" if len(found) > 1 else ""
            problems.append(f"{sum(found)} {unit}{terms} where the model has {count} {names[unit]}")
    if problems:
        advice = "correct the counts, or use 'auto'"
        if line.vision and not re.search("[VR]", text):
            advice += "; for a vision part that every rank holds whole, add --vision-parallel data"
        raise ConfigError(f"{_KEY}: {text!r} has {' and '.join(problems)}; {advice}")


def _check_stages(units: list[str], pipeline_size: int, virtual_size: int, text: str) -> None:
    if len(units) != pipeline_size * virtual_size:
        raise ConfigError(
            f"{_KEY}: {text!r} has {len(units)} stages, but {_arithmetic(pipeline_size, virtual_size)}; "
            "change the number of bars or the parallel sizes"
        )
    empty = [number for number, stage in enumerate(units[:-1]) if not stage]
    if empty:
        raise ConfigError(
            f"{_KEY}: stage {empty[0]} of {text!r} (counted from 0) is empty; "
            "only the last stage may be, since it holds the head"
        )


def _arithmetic(pipeline_size: int, virtual_size: int) -> str:
    return (
        f"pipeline_model_parallel_size {pipeline_size} x virtual_pipeline_model_parallel_size {virtual_size} "
        f"= {pipeline_size * virtual_size} stages"
    )
