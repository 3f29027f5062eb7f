"""Stages of training at the published width: time, rate, memory and kernels of real steps, and of each tower alone.

The configuration is the recipe of ``examples/qwen_vl`` without tensor parallelism, and the steps are ``train_step`` on
the model of ``build_parallel_model``. Weights are random numbers that are drawn on the device, since drawing them one
parameter at a time on the CPU takes minutes; a step costs the same on any weights.

Operations are those that the log of a training counts, ``MicroBatch.work`` by ``planning/flops.py``: what the step
requires, without recomputation and without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gpu_parts.depth import Attempt, first_that_fits, ladder
from gpu_parts.device import median_ms, memory_bytes, norm_scaled, peak_flops, seconds_of
from gpu_parts.kernels import profile_step
from gpu_parts.report import Report
from gpu_parts.rows import SHAPES, make_batches
from megatron_vl.backends.platform import prepare_process
from megatron_vl.config.load import load_config
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.flops import Flops, FrozenParts, Work, step_flops, training_flops
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import train_step

DATA_PARALLEL = 8
"""Data-parallel ranks among which the samples of a recipe's step are divided: a node."""
RECIPES = Path(__file__).resolve().parents[2] / "examples" / "qwen_vl"


@dataclass(frozen=True)
class Stage:
    """What is trained, and how good its utilization should be."""

    recipe: str
    shape: str
    goal: float
    """Share of the device's peak; the best published text-only figure at 2,048 tokens on an H100 is 0.464."""
    micro_batch_sizes: tuple[int, ...] = (2,)
    """Rows of the micro-batches that are timed, the largest last."""

    def micro_batches_of_recipe(self, batch: MicroBatch) -> int:
        """Micro-batches of a rank in a step of the recipe, which is divided among ``DATA_PARALLEL`` ranks."""
        samples = load_config(RECIPES / self.recipe, []).training.global_batch_samples
        assert samples is not None
        return max(1, round(samples / DATA_PARALLEL / batch.num_samples))


STAGES = {
    "stage1": Stage("stage1_pretrain.yaml", "stage1", 0.45, (1, 2)),
    "stage2": Stage("stage2_multitask.yaml", "stage2", 0.48, (1, 2, 4)),
    "stage3": Stage("stage3_sft.yaml", "stage3", 0.50),
    "text": Stage("stage2_multitask.yaml", "text", 0.464),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    micro_batches: int
    """Micro-batches of the long step; the short one has one."""
    steps: int
    small: bool
    backend: str
    fp8: bool = False
    """Whether the language model computes in FP8, with scales of whole tensors."""

    @classmethod
    def of(cls, *, small: bool, backend: str, fp8: bool = False) -> Sizes:
        return cls(2, 2, small, backend, fp8) if small else cls(4, 4, small, backend, fp8)


@dataclass
class Trained:
    """A model that steps on micro-batches of one shape."""

    config: RunConfig
    topology: Topology
    model: ParallelModel
    batches: list[MicroBatch]

    def step(self, count: int) -> None:
        """One step over the first micro-batches; what is frozen or skipped is the trainer's business."""
        result = train_step(self.model, self.batches[:count], config=self.config, topology=self.topology, step=0)
        assert not result.skipped, "the gradient was not finite"


def stage_config(stage: Stage, sizes: Sizes) -> RunConfig:
    """The recipe on one device; small: the tiny model with the recipe's everything else."""
    flags = ["--tensor-model-parallel-size", "1", "--no-sequence-parallel", "--backend", sizes.backend]
    flags += ["--fp8-format", "hybrid"] if sizes.fp8 else []
    config = load_config(RECIPES / stage.recipe, flags)
    rows = max(stage.micro_batch_sizes)
    training = replace(
        config.training, micro_batch_size=rows, global_batch_samples=None, global_batch_size=rows * sizes.micro_batches
    )
    config = replace(config, training=training)
    if sizes.small:
        tiny = PRESETS["tiny"]
        image = tiny.image_size * config.model.image_size // 448
        config = replace(config, model=replace(tiny, image_size=image), data=replace(config.data, seq_length=160))
    if stage.shape == "text":
        # One layer that sees the blank image of a text-only micro-batch: the published model would have none to train.
        training = replace(config.training, freeze_vision=True, freeze_resampler=True)
        model = replace(config.model, vision=replace(config.model.vision, num_layers=1))
        config = replace(config, model=model, training=training)
    return config


def measure_stage(name: str, report: Report, *, small: bool, backend: str, fp8: bool = False) -> None:
    """Everything about one stage, at the depth that fits with the largest micro-batch."""
    stage, sizes = STAGES[name], Sizes.of(small=small, backend=backend, fp8=fp8)
    config = stage_config(stage, sizes)
    batches = {
        rows: make_batches(config, SHAPES[stage.shape], count=sizes.micro_batches, rows=rows)
        for rows in stage.micro_batch_sizes
    }
    largest = batches[max(batches)]
    prepare_process()
    with Topology(config.parallel) as topology:
        attempts = ladder(config, largest[0].work, free_bytes=memory_bytes())
        if stage.shape == "text":
            attempts = iter(_language_only(attempts))

        def run(attempt: Attempt) -> Trained:
            trained = _build(attempt.applied(config), topology, largest)
            trained.step(1)
            return trained

        attempt, trained, failed = first_that_fits(attempts, run)
        for line in failed:
            print(f"did not fit: {line}")
        title = f"{name}, {_backend_of(trained)}{' in FP8' if fp8 else ''}, {attempt}"
        for rows, trained.batches in batches.items():
            _report_steps(trained, stage, report, title=f"{title}, micro-batch {rows}", sizes=sizes)
        title = f"{title}, micro-batch {max(batches)}"
        _report_parts(trained, report, title=title, sizes=sizes)
        _report_profile(trained, report, title=title)


def _language_only(attempts: Iterator[Attempt]) -> list[Attempt]:
    """Text alone keeps one vision layer at every depth."""
    return [replace(attempt, vision_layers=1) for attempt in attempts]


def _build(config: RunConfig, topology: Topology, batches: list[MicroBatch]) -> Trained:
    model = build_parallel_model(config, topology, fresh_weights=False)
    with torch.no_grad():
        for chunk in model.chunks:
            for name, parameter in chunk.named_parameters():
                _fill(name, parameter, config.model.init_method_std)
    model.optimizer.reload_model_params()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return Trained(config, topology, model, batches)


def _fill(name: str, parameter: Tensor, deviation: float) -> None:
    if parameter.dim() > 1:
        parameter.normal_(0.0, deviation)
    elif name.endswith("bias"):
        parameter.zero_()
    else:
        parameter.fill_(1.0)


def _report_steps(trained: Trained, stage: Stage, report: Report, *, title: str, sizes: Sizes) -> None:
    count = sizes.micro_batches
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    long = median(seconds_of(lambda: trained.step(count), repeat=sizes.steps, warm_up=1))
    short = median(seconds_of(lambda: trained.step(1), repeat=sizes.steps, warm_up=1))
    further = (long - short) / (count - 1)
    beside = short - further  # below zero where the times contradict each other: the machine was not quiet
    work = trained.batches[0].work
    flops = step_flops(trained.config.model, FrozenParts.of(trained.config.training), work)
    peak, source = peak_flops()
    report.figure(f"{title}: ms a further micro-batch", 1e3 * further)
    report.figure(f"{title}: ms a step beside its micro-batches", 1e3 * beside)
    # Steps of a recipe have many more micro-batches than those that are timed here; times add up.
    recipe = stage.micro_batches_of_recipe(trained.batches[0])
    step = beside + recipe * further
    report.figure(f"{title}: useful tokens/s", recipe * work.num_tokens / step)
    report.figure(f"{title}: images/s", recipe * work.num_images / step)
    report.figure(f"{title}: TFLOP/s", recipe * flops / step / 1e12)
    told = f"MFU of a step of {recipe} micro-batches ({source}, {peak / 1e12:.4g} TFLOP/s)"
    # The peak is that of bf16. No goal is set for FP8 before it has been measured once.
    report.rate(f"{title}: {told}", recipe * flops / step / peak, None if sizes.fp8 else stage.goal)
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        report.share(f"{title}: peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30, whole)


def _report_parts(trained: Trained, report: Report, *, title: str, sizes: Sizes) -> None:
    """Each tower alone, forward and backward on what it really gets; hooks of data parallelism included."""
    flops = _tower_flops(trained.config, trained.batches[0].work)
    peak, _ = peak_flops()
    for name, function in _towers(trained):
        milliseconds = median_ms(function, repeat=2 + sizes.steps)
        report.figure(f"{title}: {name}, ms a micro-batch", milliseconds)
        report.rate(f"{title}: {name}, TFLOP/s", flops[name] / milliseconds / 1e9, peak / 1e12, goal=None)


def _tower_flops(config: RunConfig, work: Work) -> dict[str, float]:
    each: Flops = training_flops(config.model, FrozenParts.of(config.training), work)
    return {
        "vision": each.vision_layer * config.model.vision.num_layers,
        "resampler": each.resampler,
        "language_model": each.language_layer * config.model.language.num_layers,
        "head": each.head,
    }


def _towers(trained: Trained) -> Iterator[tuple[str, Callable[[], None]]]:
    chunk = trained.model.chunks[0]
    names = ("vision", "resampler", "language_model") if trained.batches[0].slots.numel() else ("language_model",)
    losses = chunk.language_model.token_losses
    with (
        _kept_inputs(chunk, names) as inputs,
        mock.patch.object(chunk.language_model, "token_losses", _keeping(losses, inputs, "head")),
    ):
        trained.step(1)
    for name in names:
        yield name, _tower(getattr(chunk, name), *inputs[name])
    yield "head", _tower(losses, *inputs["head"])


def _keeping(function: Callable[..., Any], kept: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function, which also keeps what it was called with."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kept[name] = (_without_graph(args), kwargs)
        return function(*args, **kwargs)

    return wrapped


def _without_graph(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hidden states come first; the graph behind them would hold the activations of the towers before."""
    return (args[0].detach().requires_grad_(args[0].requires_grad), *args[1:])


def _tower(module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    hidden = args[0]
    own = module.parameters() if isinstance(module, nn.Module) else ()
    trains = hidden.requires_grad or any(parameter.requires_grad for parameter in own)

    def run() -> None:
        with torch.set_grad_enabled(trains):
            output = module(hidden, *args[1:], **kwargs)
        if trains:
            output.backward(norm_scaled(output))
            hidden.grad = None

    return run


@contextmanager
def _kept_inputs(chunk: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What towers get in the passes that run meanwhile."""
    kept: dict[str, Any] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[name] = (_without_graph(args), kwargs)

        return keep

    handles = [getattr(chunk, name).register_forward_pre_hook(keeper(name), with_kwargs=True) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _report_profile(trained: Trained, report: Report, *, title: str) -> None:
    count = min(2, len(trained.batches))
    trained.step(count)
    wall = 1e3 * seconds_of(lambda: trained.step(count), repeat=1, warm_up=0)[0]
    profiled = profile_step(lambda: trained.step(count))
    for name, milliseconds in profiled.by_class.items():
        report.share(f"{title}: kernels of {name}, ms of a step of {count}", milliseconds, profiled.total)
    report.share(f"{title}: kernels of a step of {count} beside its time, ms", profiled.total, wall)
    for kernel, milliseconds in profiled.longest:
        print(f"{milliseconds:10.2f} ms  {kernel[:140]}")


def _backend_of(trained: Trained) -> str:
    context = trained.model.chunks[0].language_model.backend
    return str(context.name)
