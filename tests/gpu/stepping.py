"""What must be the same to the last bit, or nearly, between runs: resumes, checkpoints of another backend, determinism,
layouts, devices, and optimizers. Each function returns what it found; the device is whatever the process has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vl.backends.core import GroupStepAdamW
from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model
from tests.gpu.differences import Difference, relative_over
from tests.gpu.parity import BF16_OUTPUT, distances, parity_config, plain_name, step
from tests.helpers.one_device import OneDeviceStart
from tests.helpers.ranks import Start
from tests.helpers.tiny import MODEL, micro_batches, tiny_config
from tests.parallel.gradients import RankGradients, step_on_rank, whole_gradients
from tests.parallel.saving import save_fresh_weights, train_steps

FP32_ELSEWHERE = 1e-4
"""Gradients in fp32 on another device or in another layout there: other kernels add in another order."""
SMALLEST_VOCABULARY = MODEL.language.vocab_size
"""Rows of the vocabulary beyond it only pad it, in one of the two models."""
ADAM_STEPS = 5


@dataclass(frozen=True)
class Layout:
    """One way to spread a step over two ranks; virtual stages need four chunks."""

    name: str
    parallel: dict[str, Any]


FUSED_LAYOUT = Layout("tensor + sequence", {"tensor_model_parallel_size": 2, "sequence_parallel": True})
"""The layout of the recipes of stages 2 and 3, for Transformer Engine's own communication."""

LAYOUTS = (
    Layout("tensor", {"tensor_model_parallel_size": 2}),
    Layout("tensor + sequence", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    Layout("pipeline", {"pipeline_model_parallel_size": 2}),
    Layout("virtual pipeline", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    Layout("data, sharded optimizer", {"use_distributed_optimizer": True}),
    Layout("data, overlapped", {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
)


def step_on_one_device(start: Start, config: RunConfig) -> RankGradients:
    """Loss and gradients of one step, on this rank of several on one device."""
    return step_on_rank(OneDeviceStart.of(start), config, micro_batches(config.model, 8))


def layout_config(parallel: dict[str, Any], backend: str = "local") -> RunConfig:
    """The tiny model's step in fp32 at a layout."""
    return tiny_config(parallel=parallel | {"backend": backend})


def fused_config(backend: str, parallel: dict[str, Any]) -> RunConfig:
    """A step in bf16 of the model with the published heads, at a layout."""
    config = parity_config(backend, bf16=True)
    return replace(config, parallel=replace(config.parallel, use_distributed_optimizer=False, **parallel))


def against_one_rank(
    title: str, ranks: list[RankGradients], one: list[RankGradients], *, allowed: float = FP32_ELSEWHERE
) -> list[Difference]:
    """Loss and gradients of a layout beside those of one rank."""
    found, exact = (whole_gradients(each, vocab_size=SMALLEST_VOCABULARY) for each in (ranks, one))
    return [
        Difference(f"{title}: loss", abs(ranks[0].loss / one[0].loss - 1.0), allowed),
        Difference(f"{title}: gradients", relative_over(found, exact), allowed),
    ]


def resume(start: Start, backend: str, folder: Path, *, bf16: bool) -> list[Difference]:
    """Four steps at once, and two and two with a checkpoint between: the same losses to the last bit."""
    config = parity_config(backend, bf16=bf16)
    run = _Calls(start)
    straight = run(train_steps, config, 4, None, None)
    first = run(train_steps, config, 2, folder, None)
    second = run(train_steps, config, 2, None, folder)
    largest = max(abs(a - b) for a, b in zip(straight, first + second, strict=True))
    return [Difference(f"{backend}: resumed losses", largest, 0.0)]


def exchange(start: Start, writer: str, reader: str, folder: Path) -> list[Difference]:
    """Weights of one backend's checkpoint in another: the same numbers, and so nearly the same step."""
    run = _Calls(start)
    saved = run(save_fresh_weights, parity_config(writer, bf16=True), folder)
    configs = [parity_config(backend, bf16=True) for backend in (writer, reader)]
    weights = [run(_loaded_weights, config, saved) for config in configs]
    steps = [run(step, config, "segment", saved) for config in configs]
    title = f"{writer} -> {reader}"
    found = [Difference(f"{title}: weights", relative_over(weights[1], weights[0]), 0.0)]
    return found + [
        Difference(f"{title}: {name}", value, 2 * BF16_OUTPUT) for name, value in distances(steps[1], steps[0]).items()
    ]


def determinism(start: Start, backend: str) -> list[Difference]:
    """Two steps with ``deterministic_mode``: the same bits."""
    config = parity_config(backend, bf16=True)
    config = replace(config, training=replace(config.training, deterministic_mode=True))
    run = _Calls(start)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(step, config, "segment") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    return [Difference(f"{backend}: {name}, twice", value, 0.0) for name, value in distances(second, first).items()]


def optimizers(reference: Callable[..., torch.optim.Optimizer], device: torch.device) -> list[Difference]:
    """Our AdamW beside another, over steps with random gradients and two groups as in training."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (64, 48), "bias": (48,), "table": (300, 64)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(ADAM_STEPS)
    ]
    ours, theirs = (_train(make, start, gradients, device) for make in (GroupStepAdamW, reference))
    return [Difference("GroupStepAdamW: weights", relative_over(ours, theirs), 1e-6)]


def _train(
    make: Callable[..., torch.optim.Optimizer],
    start: dict[str, Tensor],
    gradients: Iterable[dict[str, Tensor]],
    device: torch.device,
) -> dict[str, Tensor]:
    parameters = {name: value.to(device, copy=True).requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [value for value in parameters.values() if value.dim() > 1], "weight_decay": 0.05},
        {"params": [value for value in parameters.values() if value.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    for each in gradients:
        for name, gradient in each.items():
            parameters[name].grad = gradient.to(device, copy=True)
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


def _loaded_weights(start: Start, config: RunConfig, checkpoint: Path) -> dict[str, Tensor]:
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology, fresh_weights=False)
        contents.load(contents.Trained(chunks, None), checkpoint, config=config, topology=topology)
        return {plain_name(name): value.detach().float().cpu() for name, value in chunks[0].named_parameters()}


class _Calls:
    """Calls in one process, each with a meeting place of its own."""

    def __init__(self, start: Start) -> None:
        self._start, self._count = start, 0

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self._count += 1
        return function(replace(self._start, init_method=f"{self._start.init_method}.{self._count}"), *args)
