"""Runs on a rank: a training run, and what it leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.training.metrics import StepMetrics
from megatron_vl.training.trainer import Trainer
from tests.helpers.ranks import Start


@dataclass(frozen=True)
class RunRecord:
    """What one rank reports of its run."""

    losses: list[float]
    rows: list[list[int]]
    """Global rows of each step; of the ranks that read."""
    hashes: dict[str, str]
    """SHA-256 of every parameter and optimizer state of this rank, at the end."""
    names_trained: list[str]
    changed: list[str]
    """Parameters whose value is not the one they had at the start."""


class _Losses:
    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, metrics: StepMetrics) -> None:
        self.values.append(metrics.lm_loss)

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def train_on_rank(start: Start, config: RunConfig) -> RunRecord:
    """Train as ``config`` says."""
    with start.topology(config.parallel) as topology:
        trainer = Trainer.set_up(config, topology)
        losses = _Losses()
        trainer.reporter._sinks = [losses]
        rows: list[list[int]] = []
        if trainer.feed.loader is not None:
            read = trainer.feed.loader.rows_of_step
            first, size = trainer.state.consumed_rows, config.training.global_batch_size
            count = config.training.train_iters - trainer.state.step
            rows = [read(first + step * size).tolist() for step in range(count)]
        before = {name: value.clone() for name, value in _parameters(trainer).items()}
        trainer.loop()
        trainer.close()
        after = _parameters(trainer)
        return RunRecord(
            losses=losses.values,
            rows=rows,
            hashes=_hashes(trainer),
            names_trained=sorted(name for name, value in after.items() if value.requires_grad),
            changed=sorted(name for name, value in after.items() if not torch.equal(value, before[name])),
        )


def _parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value for chunk in trainer.model.chunks for name, value in chunk.named_parameters()}


def _hashes(trainer: Trainer) -> dict[str, str]:
    tensors = {name: value.detach() for name, value in _parameters(trainer).items()}
    for number, optimizer in enumerate(trainer.model.optimizer.chained_optimizers):
        inner = optimizer.optimizer
        for group_number, group in enumerate(inner.param_groups):
            for position, parameter in enumerate(group["params"]):
                for name, value in inner.state[parameter].items():
                    tensors[f"{number}.{group_number}.{position}.{name}"] = value
            tensors[f"{number}.{group_number}.step"] = torch.tensor(group["step"])
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in tensors.items()}
