"""From the times of stages that a profile has measured to a factor for each part of the model.

A plan calculates the seconds of a stage as a sum over vision part, language layers and head. Here each of them gets a
factor for its forward and one for its backward passes, so that the calculated times of the profiled stages become the
measured ones. The factors are then used for every other layout.

One direction is a small system of linear equations, in the factors:

* for each stage: the mean over its micro-batches. This has by far the most weight, so it holds exactly if any factors
  fulfil it;
* for each stage and micro-batch: the difference from the mean. Micro-batches with many images and with few tell the
  vision part from the language model, where one stage holds both;
* for each part: the factor that all parts would have together, with the least weight. It decides what is still open.

Sums of weight gradients and collectives of tensor parallelism are subtracted first, at the rates of the GPU. Where the
CPU limits a stage, its launches are compared instead of the kernels. Each equation is divided by the stage's mean.

Factors are those of one kind of GPU and one precision. A profile of a CPU, of another kind or of another precision than
the plan's says nothing about the plan, so :func:`check_profile_is_of` refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema import ModelConfig, RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.activations import Keeping
from megatron_vl.planning.gpus import AS_RATED, GPUS, Gpu, PartFactors, Slowness
from megatron_vl.planning.layout import StageLayout, resolve_layout, vision_part
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.stage_cost import PassCost, StageCost, UnitCosts, sum_of_gradients
from megatron_vl.planning.stage_profile import MicroBatchTimes, StageProfile, VisionTimes
from megatron_vl.planning.vision_share import VisionShare

Direction = Literal["forward", "backward"]
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_PARTS = ("vision", "language", "head")
_OF_MEANS, _OF_ALIKE, _FACTOR_OF_ALIKE = 1e4, 1e-3, 10.0
_FARTHEST = 10.0
"""A factor that is so many times the common one, or so small a part of it, comes from noise; then they are drawn
together until none is."""
_ROUNDS = 10
_NAMED = 4
"""Differences of two models that are named."""


@dataclass(frozen=True)
class StageCheck:
    """A stage of the profile: seconds of a mean micro-batch, forward and backward."""

    name: str
    measured: Slowness
    calculated: Slowness
    """At the rates of the GPU."""
    fitted: Slowness
    """With the factors."""


@dataclass(frozen=True)
class Calibration:
    """What a profile says of a GPU."""

    factors: PartFactors
    stages: tuple[StageCheck, ...]


def check_profile_is_of(profile: StageProfile, gpu: Gpu, config: RunConfig) -> None:
    """Check that a profile was made on the kind of GPU and in the precision of a plan.

    A kind is a word of the device's name as CUDA gives it, such as "NVIDIA H100 80GB HBM3": a GB200 is no B200.

    Args:
        config: the planned run. Its model may be another one.

    Raises:
        ConfigError: if not.
    """
    words = re.split(r"[^a-z0-9]+", profile.device.lower())
    if gpu.name not in words:
        kind = next((name for name in GPUS if name in words), None)
        other = f"plan with --gpu {kind}, or profile" if kind else "profile"
        raise ConfigError(
            f"stage_times.device: a profile of {'a CPU' if words == ['cpu'] else repr(profile.device)} says nothing "
            f"about --gpu {gpu.name}; {other} a run on that GPU (tools/train.py --profile)"
        )
    found, planned = _precision(profile.config), _precision(config)
    if found != planned:
        raise ConfigError(
            f"stage_times.config: a profile in {found} says nothing about a plan in {planned}; give both the same "
            "--bf16 and --fp8 flags"
        )


def _precision(config: RunConfig) -> str:
    training = config.training
    usual = "bf16" if training.bf16 else "fp32"
    if training.fp8_format is None:
        return usual
    return f"{usual} with FP8 ({training.fp8_format}, {training.fp8_recipe}, parts: {training.fp8_parts})"


def calibrate(profile: StageProfile, gpu: Gpu) -> Calibration:
    """Return the factors by which a GPU is slower than its rates.

    Raises:
        ConfigError: if the profile has no times, or fewer seconds than its collectives take at the rates of the GPU.
    """
    if not profile.micro_batches:
        raise ConfigError("stage_times.micro_batches is empty: a profile has a row for each micro-batch")
    gpu = replace(gpu.within(profile.world_size), factors=AS_RATED)
    stages = tuple(_stages(profile))
    forward, backward = (_solve(stages, gpu, direction) for direction in _DIRECTIONS)
    factors = PartFactors(*(Slowness(*pair) for pair in zip(forward, backward, strict=True)))
    checks = tuple(
        StageCheck(
            stage.name,
            Slowness(stage.mean("forward").measured, stage.mean("backward").measured),
            stage.seconds(gpu, AS_RATED),
            stage.seconds(gpu, factors),
        )
        for stage in stages
    )
    return Calibration(factors, checks)


@dataclass(frozen=True)
class _Pass:
    """A pass of a stage: what each part costs by the plan, and how long all took."""

    parts: dict[str, PassCost]
    besides: PassCost
    """What belongs to no part."""
    measured: float

    def total(self, factors: Sequence[float]) -> PassCost:
        """Return the cost with a factor for each part."""
        slowed = (self.parts[name].slowed(factor) for name, factor in zip(_PARTS, factors, strict=True))
        return sum(slowed, self.besides)

    def terms(self, gpu: Gpu, factors: Sequence[float]) -> tuple[NDArray[np.float64], float]:
        """Return the seconds of each part at factor 1, and those that no factor changes.

        ``factors``, a first estimate, say whether the GPU or the CPU limits the pass.
        """
        total = self.total(factors)
        parts = [self.parts[name] for name in _PARTS]
        if total.launches * gpu.host_seconds > total.gpu_seconds(gpu):
            return np.array([cost.launches * gpu.host_seconds for cost in parts]), 0.0
        kernels = [cost.gpu_seconds(gpu) - cost.exposed_seconds(gpu) for cost in parts]
        return np.array(kernels), total.exposed_seconds(gpu) + self.besides.gpu_seconds(gpu)


@dataclass(frozen=True)
class _Stage:
    """The passes of a stage, one for each micro-batch."""

    name: str
    passes: dict[Direction, list[_Pass]]

    def mean(self, direction: Direction) -> _Pass:
        """Return the pass of the mean work: costs are linear in the work."""
        passes, share = self.passes[direction], 1 / len(self.passes[direction])
        parts = {name: sum((one.parts[name] for one in passes), PassCost()).times(share) for name in _PARTS}
        return _Pass(parts, passes[0].besides, share * sum(one.measured for one in passes))

    def seconds(self, gpu: Gpu, factors: PartFactors) -> Slowness:
        """Return what a plan calculates for the mean pass."""
        forward, backward = (
            self.mean(direction).total([getattr(getattr(factors, name), direction) for name in _PARTS]).seconds(gpu)
            for direction in _DIRECTIONS
        )
        return Slowness(forward, backward)

    def equations(self, gpu: Gpu, factors: Sequence[float], direction: Direction) -> Iterator[_Equation]:
        """Yield what the factors have to fulfil; nothing where a plan counts nothing.

        Raises:
            ConfigError: if less was measured than no factor changes.
        """
        mean = self.mean(direction)
        seconds, fixed = mean.terms(gpu, factors)
        left = mean.measured - fixed
        if not seconds.any():
            return
        if left <= 0:
            raise ConfigError(
                f"stage_times: {self.name} took {mean.measured:.3g} s {direction}, but its collectives and the sums of "
                f"its gradients alone take {fixed:.3g} s at the rates of {gpu.name}: name the GPU of the profile, or "
                "add its nvlink_gb_per_s and memory_gb_per_s to the file"
            )
        yield _Equation(_OF_MEANS * seconds / left, _OF_MEANS, seconds.sum(), left)
        for one in self.passes[direction]:
            own, own_fixed = one.terms(gpu, factors)
            yield _Equation((own - seconds) / left, (one.measured - own_fixed - left) / left)


@dataclass(frozen=True)
class _Equation:
    """``coefficients`` x factors = ``value``."""

    coefficients: NDArray[np.float64]
    value: float
    calculated: float = 0.0
    """Of a mean: the seconds of all parts at factor 1."""
    measured: float = 0.0
    """Of a mean: those that were measured for them."""


def _stages(profile: StageProfile) -> Iterator[_Stage]:
    """Yield the stages of the profiled pipeline, and the vision part where every rank holds it."""
    config, keeping = profile.config, Keeping.of(profile.config)
    layout = Layout.of(config, resolve_layout(config))
    units = [UnitCosts.of(config, row.work, keeping) for row in profile.micro_batches]
    for number, (stage, trained) in enumerate(zip(layout.stages.stages, layout.trained, strict=True)):
        times = [_times(row, number, len(layout.trained)) for row in profile.micro_batches]
        yield _stage(f"stage {number} ({stage.units or 'head'})", stage, trained, list(zip(units, times, strict=True)))
    seen = [one for one in profile.vision if one.images]
    if seen:
        shares = [VisionShare(config, one.images, one.images, layout.everywhere) for one in seen]
        rows = [(share.units, _alone(share, one)) for share, one in zip(shares, seen, strict=True)]
        yield _stage("vision part on every rank", vision_part(config.model), layout.everywhere, rows)


def _stage(name: str, stage: StageLayout, trained: float, rows: Sequence[tuple[UnitCosts, Slowness]]) -> _Stage:
    forward, backward = [], []
    for units, seconds in rows:
        parts: dict[str, StageCost] = units.parts(stage)
        forward.append(_Pass({part: cost.forward for part, cost in parts.items()}, PassCost(), seconds.forward))
        backwards = {part: cost.backward for part, cost in parts.items()}
        backward.append(_Pass(backwards, sum_of_gradients(trained), seconds.backward))
    return _Stage(name, {"forward": forward, "backward": backward})


def _times(row: MicroBatchTimes, stage: int, num_stages: int) -> Slowness:
    """Return the seconds of a micro-batch in a stage."""
    if not len(row.forward) == len(row.backward) == num_stages:
        raise ConfigError(
            f"stage_times: a micro-batch of step {row.step} has {len(row.forward)} forward and {len(row.backward)} "
            f"backward times, expected one for each of the {num_stages} stages of its configuration"
        )
    return Slowness(row.forward[stage], row.backward[stage])


def _alone(share: VisionShare, times: VisionTimes) -> Slowness:
    """Return the seconds for images that are encoded together, without the second encoding."""
    again = times.forward if share.recomputes else 0.0
    return Slowness(times.forward / share.parts, max(0.0, times.backward - again) / share.parts)


def _solve(stages: Sequence[_Stage], gpu: Gpu, direction: Direction) -> list[float]:
    """Return the factors of one direction in the order of the parts."""
    factors = [1.0] * len(_PARTS)
    for _ in range(_ROUNDS):  # which passes the CPU limits may change with the factors
        equations = [one for stage in stages for one in stage.equations(gpu, factors, direction)]
        if not equations:
            return factors
        found = _least_squares(equations)
        if np.allclose(found, factors, rtol=1e-9):
            break
        factors = found
    return factors


def _least_squares(equations: Sequence[_Equation]) -> list[float]:
    """Return the factors that fulfil the equations best, none of them far from the common one."""
    common = sum(one.measured for one in equations) / sum(one.calculated for one in equations)
    matrix = np.array([one.coefficients for one in equations]) * common
    values = np.array([one.value for one in equations])
    alike = _OF_ALIKE
    while True:
        rows = np.vstack([matrix, alike * np.eye(len(_PARTS))])
        found = np.linalg.lstsq(rows, np.append(values, [alike] * len(_PARTS)), rcond=None)[0]
        if (found > 1 / _FARTHEST).all() and (found < _FARTHEST).all():
            return [float(common * value) for value in found]
        alike *= _FACTOR_OF_ALIKE


def describe(profile: StageProfile, found: Calibration, model: ModelConfig) -> list[str]:
    """Return what was taken from a profile, for people.

    Args:
        model: that of the plan.
    """
    steps, rows = profile.steps, len(profile.micro_batches)
    factors = (
        f"{name} {value.forward:.3g} forward, {value.backward:.3g} backward"
        for name, value in zip(("vision part", "language layers", "head"), vars(found.factors).values(), strict=True)
    )
    lines = [
        f"profile: steps {steps[0]} to {steps[-1]} on {profile.world_size} x {profile.device}, {rows} micro-batches",
        f"  times as long as at the rates of the GPU: {'; '.join(factors)}",
    ]
    for stage in found.stages:
        measured, calculated, fitted = stage.measured, stage.calculated, stage.fitted
        lines.append(
            f"  {stage.name}: measured {measured.forward:.4g} + {measured.backward:.4g} s a micro-batch, calculated "
            f"{calculated.forward:.4g} + {calculated.backward:.4g}, with these factors {fitted.forward:.4g} + "
            f"{fitted.backward:.4g}"
        )
    if other := _differences(profile.config.model, model):
        more = f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
        lines.append(f"  the profile is of another model than the plan: {', '.join(other[:_NAMED])}{more}")
    if profile.traced_ranks:
        ranks = ", ".join(map(str, profile.traced_ranks))
        lines.append(f"  rank {ranks} wrote a trace meanwhile, which slows launches (--no-use-pytorch-profiler)")
    return lines


def _differences(profiled: ModelConfig, planned: ModelConfig) -> list[str]:
    """Return the settings in which two models differ, with both values."""
    pairs = zip(_settings(asdict(profiled)), _settings(asdict(planned)), strict=True)
    return [f"{name} {one} (the plan: {other})" for (name, one), (_, other) in pairs if one != other]


def _settings(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
