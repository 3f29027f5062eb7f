"""Each validation set has its own loss, over as many global batches as if it were the only one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validation_sets import validation_sets
from megatron_vl.errors import ConfigError
from megatron_vl.training import trainer
from megatron_vl.training.metrics import Reporter
from megatron_vl.training.trainer import Trainer
from tests.helpers.data.prepared import SEQ_LENGTH, make_data_set
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config


def names(*prefixes: str) -> list[str]:
    return [name for name, _ in validation_sets(tiny_config(data={"valid_data_path": prefixes}))]


def test_a_loss_is_named_after_its_data_set() -> None:
    assert names() == []
    assert names("data/mine") == ["mine"]
    assert names("a/mine", "/b/other.v2") == ["mine", "other.v2"]
    assert names("x/en/valid", "x/zh/valid", "/test") == ["en/valid", "zh/valid", "/test"]
    assert names("a/b/valid", "c/b/valid") == ["a/b/valid", "c/b/valid"]


@pytest.mark.parametrize(
    ("prefixes", "part"),
    [(("0.7", "a", "0.3", "b"), "without weights"), (("a", "b", "./a"), "names a more than once")],
)
def test_validation_sets_without_a_name_of_their_own_are_refused(prefixes: tuple[str, ...], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        names(*prefixes)


def train_on_rank(start: Start, config: RunConfig) -> None:
    with start.topology(config.parallel) as topology:
        run = Trainer.set_up(config, topology)
        run.loop()
        run.close()


def note_what_is_timed_on_rank(start: Start, config: RunConfig) -> list[tuple[str, bool]]:
    """What the trainer does, in order, and whether it counts as training."""
    notes: list[tuple[str, bool]] = []
    stopped: list[int] = []

    @contextmanager
    def not_training(reporter: Reporter) -> Iterator[None]:
        stopped.append(1)
        yield
        stopped.pop()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            notes.append((name, not stopped))
            return function(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for owner, name in ((trainer, "train_step"), (trainer, "evaluate"), (contents, "save")):
            patches.enter_context(mock.patch.object(owner, name, noting(name, getattr(owner, name))))
        patches.enter_context(mock.patch.object(Reporter, "not_training", not_training))
        train_on_rank(start, config)
    return notes


def test_neither_validating_nor_saving_counts_as_training(ranks: RankPools, tmp_path: Path) -> None:
    config = tiny_config(
        data={"data_path": (prefix := make_data_set(tmp_path, "rows"),), "seq_length": SEQ_LENGTH}
        | {"valid_data_path": (prefix,)},
        training={"train_iters": 2, "eval_interval": 1, "global_batch_size": 4},
        checkpoint={"save": str(tmp_path / "run"), "save_interval": 1},
    )
    assert ranks(1).run(note_what_is_timed_on_rank, config)[0] == [
        ("train_step", True), ("evaluate", False), ("save", False),
    ] * 2  # fmt: skip


def test_losses_of_several_sets_are_those_of_each_alone(ranks: RankPools, tmp_path: Path) -> None:
    pairs = make_data_set(tmp_path / "en", "valid")
    documents = [{"name": "documents", "type": "text", "path": "text.jsonl"}]
    text = make_data_set(tmp_path / "zh", "valid", sources=documents)
    base = tiny_config(
        data={"data_path": (pairs,), "seq_length": SEQ_LENGTH},
        training={"train_iters": 2, "eval_interval": 1, "eval_iters": 1, "global_batch_size": 4},
    )

    def losses(*sets: str) -> dict[tuple[int, str], float]:
        log = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        config = replace(base, data=replace(base.data, valid_data_path=sets))
        ranks(1).run(train_on_rank, replace(config, logging=replace(config.logging, log_file=str(log))))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return {
            (line["iteration"], line["validation_set"]): line["validation_loss"]
            for line in lines
            if "validation_loss" in line
        }

    alone = [losses(pairs), losses(text)]
    both = losses(pairs, text)
    for step in (1, 2):
        assert both[step, "en/valid"] == alone[0][step, "valid"]
        assert both[step, "zh/valid"] == alone[1][step, "valid"]
        assert both[step, "en/valid"] != pytest.approx(both[step, "zh/valid"], rel=1e-3)
