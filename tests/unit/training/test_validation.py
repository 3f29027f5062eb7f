"""Each validation set has its own loss, over as many global batches as if it were the only one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validation_sets import validation_sets
from megatron_vl.errors import ConfigError
from megatron_vl.training.trainer import Run
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.unit.data.prepared import SEQ_LENGTH, make_data_set


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
        run = Run.set_up(config, topology)
        run.loop()
        run.close()


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
