"""Steps that are not finite: no rank trains on them, they are named, they cost no checkpoint, and they end a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.checkpoint import contents, store
from megatron_vl.cli import inspect_data
from megatron_vl.config.schema import CheckpointConfig, RunConfig
from megatron_vl.errors import CheckpointError, ExitStatus, NotFiniteError
from megatron_vl.training.not_finite import check_before_save
from megatron_vl.training.trainer import Trainer
from tests.helpers.listening import heard
from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config

MICRO_BATCHES = 2


@dataclass(frozen=True)
class Poison:
    """Which steps (from 1) go wrong, where, and what of them: the loss alone, or the gradient alone."""

    steps: tuple[int, ...]
    rank: int
    loss: bool = True
    micro_batch: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    error: str
    steps: int
    skipped: int
    changed: tuple[int, ...]
    """Steps that changed a weight of this rank."""
    rows: tuple[list[int], ...]
    """Rows of each step on ranks that read."""
    warnings: tuple[str, ...]


def train_poisoned(start: Start, config: RunConfig, poison: Poison) -> Outcome:
    """Train with numbers that are not finite on one rank in some steps."""
    with start.topology(config.parallel) as topology, heard() as warnings:
        trainer = Trainer.set_up(config, topology)
        if topology.rank == poison.rank:
            _poison(trainer, poison)
        rows = tuple(_rows(trainer, config)) if trainer.feed.loader else ()
        error, changed, advance = "", [], trainer.advance

        def watched(batches: Any) -> None:
            before = [parameter.detach().clone() for chunk in trainer.model.chunks for parameter in chunk.parameters()]
            try:
                advance(batches)
            finally:
                after = [parameter for chunk in trainer.model.chunks for parameter in chunk.parameters()]
                if not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
                    changed.append(trainer.state.step)

        trainer.advance = watched  # type: ignore[method-assign]
        try:
            trainer.loop()
        except NotFiniteError as found:
            error = str(found)
        trainer.close()
    return Outcome(error, trainer.state.step, trainer.state.skipped_steps, tuple(changed), rows, tuple(warnings))


def _poison(trainer: Trainer, poison: Poison) -> None:
    chunk, calls = trainer.model.chunks[-1], iter(range(10**6))
    parameter = next(parameter for parameter in chunk.parameters() if parameter.requires_grad)

    def spoil_loss(module: nn.Module, inputs: Any, losses: Tensor) -> Tensor:
        step, micro_batch = divmod(next(calls), MICRO_BATCHES)
        bad = step + 1 in poison.steps and micro_batch == poison.micro_batch
        return losses + float("nan") if bad else losses  # the gradient stays finite

    def spoil_gradient(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if trainer.state.step + 1 in poison.steps else gradient

    if poison.loss:
        chunk.register_forward_hook(spoil_loss)
    else:
        parameter.register_hook(spoil_gradient)


def _rows(trainer: Trainer, config: RunConfig) -> Iterator[list[int]]:
    size = config.training.global_batch_size
    for step in range(config.training.train_iters):
        assert trainer.feed.loader
        yield trainer.feed.loader.rows_of_step(step * size).tolist()


def _config(prefix: str, root: Path, *, steps: int, parallel: dict[str, Any], world_size: int) -> RunConfig:
    data_parallel = world_size if not parallel else 1
    return tiny_config(
        data={"data_path": (prefix,), "seq_length": SEQ_LENGTH, "attention_span": "segment"},
        training={
            "train_iters": steps,
            "micro_batch_size": 1,
            "global_batch_size": MICRO_BATCHES * data_parallel,
            "max_skipped_steps": 3,
        },
        parallel={"use_distributed_optimizer": True} | parallel,
        checkpoint={"save": str(root), "save_interval": 1, "keep_last": 1},
        logging={"log_interval": 1, "progress": False},
    )


LAYOUTS = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_only_skips_steps_ends_and_keeps_its_last_good_checkpoint(
    ranks: RankPools, prefix: str, tmp_path: Path, layout: str, loss: bool
) -> None:
    size, parallel = LAYOUTS[layout]
    config = _config(prefix, tmp_path, steps=9, parallel=parallel, world_size=size)
    outcomes = ranks(size).run(train_poisoned, config, Poison((3, 4, 5, 6, 7, 8, 9), size - 1, loss))
    for outcome in outcomes:
        assert "step 5: loss or gradient was not finite in 3 steps in a row" in outcome.error
        assert (outcome.steps, outcome.skipped, outcome.changed) == (5, 3, (1, 2))
    assert store.steps_in(tmp_path) == [2]
    assert len(outcomes[0].warnings) == 3
    for step, (warning, rows) in enumerate(zip(outcomes[0].warnings, outcomes[0].rows[2:], strict=False), start=3):
        assert f"step {step} skipped on all ranks" in warning
        data_set, _, numbers = warning.rpartition("; ")[2].partition(" rows ")
        named = [int(number) for number in numbers.split(", ")]
        assert data_set == prefix
        assert set(named) < set(rows) if loss else named == sorted(rows)
    assert inspect_data.main([prefix, "--first", str(named[0]), "--rows", "1", "--output", f"{tmp_path}/a.html"]) == 0


def test_the_micro_batch_that_is_named_is_the_one_that_was_bad(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    config = _config(prefix, tmp_path, steps=1, parallel={}, world_size=1)
    named = set()
    for micro_batch in range(MICRO_BATCHES):
        (outcome,) = ranks(1).run(train_poisoned, config, Poison((1,), 0, micro_batch=micro_batch))
        named.add(int(outcome.warnings[0].rpartition(" ")[2]))
        assert "in 1 steps in a row" in outcome.error, "nothing else was done to the end: the run has learned nothing"
    assert named == set(outcome.rows[0])
    assert not store.steps_in(tmp_path)


def test_checkpoints_wait_for_a_good_step(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    config = _config(prefix, tmp_path, steps=6, parallel={}, world_size=2)
    for outcome in ranks(2).run(train_poisoned, config, Poison((2, 3, 6), 1)):
        assert (outcome.error, outcome.steps, outcome.skipped, outcome.changed) == ("", 6, 3, (1, 4, 5))
    assert store.steps_in(tmp_path) == [5, 6], "the last one is written, but does not replace the good one"
    state = json.loads((store.directory_of(tmp_path, 6) / "state.json").read_text())
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (3, 1)


def save_and_load_nan(start: Start, config: RunConfig, bad: str) -> list[str]:
    """Put a NaN into a weight or a moment of rank 0; what a save says, and what a load of such a checkpoint says."""
    with start.topology(config.parallel) as topology:
        trainer = Trainer.set_up(config, topology)
        trainer.advance(next(trainer.feed.steps(0)))
        optimizer = trainer.model.optimizer.chained_optimizers[0].optimizer
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        values = moments if bad == "exp_avg" else list(trainer.model.chunks[0].parameters())
        if topology.rank == 0:  # of a replica elsewhere, nothing is saved
            with torch.no_grad():
                values[-1].view(-1)[-1] = float("nan")
        said = []
        try:
            check_before_save(trainer.model, topology, trainer.state.step)
        except NotFiniteError as error:
            said.append(str(error))
        trained = contents.Trained(trainer.model.chunks, trainer.model.optimizer)
        root = Path(str(config.checkpoint.save))
        contents.save(trained, asdict(trainer.state), config=config, topology=topology, root=root)
        try:
            Trainer.set_up(config, topology)
        except CheckpointError as error:
            said.append(str(error))
        return said


@pytest.mark.parametrize("bad", ["weight", "exp_avg"])
def test_what_is_not_finite_is_neither_saved_nor_loaded(
    ranks: RankPools, prefix: str, tmp_path: Path, bad: str
) -> None:
    config = _config(prefix, tmp_path, steps=2, parallel={"tensor_model_parallel_size": 2}, world_size=2)
    config = replace(config, checkpoint=CheckpointConfig(save=str(tmp_path), auto_resume=True))
    for said in ranks(2).run(save_and_load_nan, config, bad):
        assert len(said) == 2
        assert "not finite, so no checkpoint is written" in said[0]
        assert "not finite; start from another checkpoint" in said[1]


def test_the_status_is_its_own() -> None:
    assert NotFiniteError("").exit_status == ExitStatus.NOT_FINITE == 3
