"""Runs on a rank: checkpoints of a model and of an optimizer that has taken a step."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import evaluate, train_step
from tests.helpers.ranks import Start
from tests.helpers.tiny import micro_batches
from tests.parallel.gradients import own_images

BATCHES = 4
"""Of a step, over all data-parallel ranks: two for each, as many as two virtual stages want."""


def save_fresh_weights(start: Start, config: RunConfig, root: Path) -> Path:
    """A checkpoint of weights that nothing has trained."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        trained = contents.Trained(build_model(config, topology), None)
        return contents.save(trained, {"step": 0}, config=config, topology=topology, root=root)


def train_steps(
    start: Start, config: RunConfig, steps: int, save: Path | None, load: Path | None, interrupted: bool = False
) -> list[float]:
    """Losses of ``steps`` steps from fresh weights or from ``load``; ``save`` receives a checkpoint at the end.

    Where it is ``interrupted``, a validation and a checkpoint follow on every step.
    """
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology, fresh_weights=load is None)
        trained, first = contents.Trained(model.chunks, model.optimizer), 0
        if load:
            first = contents.load(trained, load, config=config, topology=topology, load_rng=False)["step"]
        losses = []
        for step in range(first, first + steps):
            batches = micro_batches(config.model, BATCHES, seed=100 * step)[topology.dp_rank :: topology.dp_size]
            batches = own_images(batches, config, topology)
            losses.append(train_step(model, batches, config=config, topology=topology, step=step).loss.mean)
            if interrupted:
                evaluate(model.wrapped, [batches], topology=topology)
            if save and interrupted:
                contents.save(trained, {"step": step + 1}, config=config, topology=topology, root=save)
        if save and not interrupted:
            contents.save(trained, {"step": first + steps}, config=config, topology=topology, root=save)
        return losses
