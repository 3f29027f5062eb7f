"""From where a run may go on and from where not, and that the recipe stages train what the paper trains.

That a run which goes on equals one that was never interrupted is shown for every recipe in ``test_recipes.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.config.schema import CheckpointConfig, RunConfig
from tests.helpers.listening import heard
from tests.helpers.prepared import SEQ_LENGTH, prepare_tiny
from tests.helpers.ranks import RankError, RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.integration.running import RunRecord, train_on_rank


def _config(prefix: str, *, steps: int, **sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "data": {"data_path": (prefix,), "seq_length": SEQ_LENGTH, "attention_span": "segment"},
        "training": {"train_iters": steps, "micro_batch_size": 1, "global_batch_size": 4},
        "parallel": {"use_distributed_optimizer": True},
        "logging": {"log_interval": 1, "progress": False},
    }
    for name, fields in sections.items():
        base[name] = base.get(name, {}) | fields
    return tiny_config(**base)


def _train(ranks: RankPools, world_size: int, config: RunConfig) -> list[RunRecord]:
    records: list[RunRecord] = ranks(world_size).run(train_on_rank, config)
    return records


PARTS = ("vision.", "resampler.", "language_model.")
STAGES = {
    "stage 1: vision tower and adapter": ({"freeze_language_model": True}, PARTS[:2]),
    "stage 2: everything": ({}, PARTS),
    "stage 3: adapter and language model": ({"freeze_vision": True}, PARTS[1:]),
    "stage 0: language model": ({"freeze_vision": True, "freeze_resampler": True}, PARTS[2:]),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_stage_trains_what_the_paper_trains(ranks: RankPools, prefix: str, stage: str, world_size: int) -> None:
    frozen, parts = STAGES[stage]
    parallel = {"pipeline_model_parallel_size": world_size}
    config = _config(prefix, steps=2, parallel=parallel, training={"micro_batch_size": 2} | frozen)
    records = _train(ranks, world_size, config)
    trained = [name for record in records for name in record.names_trained]
    changed = [name for record in records for name in record.changed]
    assert sorted(trained) == sorted(changed)
    assert {name.split(".")[0] + "." for name in trained} == set(parts)


def test_a_run_refuses_to_start_over_in_a_directory_with_checkpoints(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    config = _config(prefix, steps=1, checkpoint={"save": str(tmp_path)})
    _train(ranks, 1, config)
    with pytest.raises(RankError, match="would start over: add --auto-resume"):
        _train(ranks, 1, config)
    again = _config(prefix, steps=2, checkpoint={"save": str(tmp_path), "auto_resume": True})
    assert len(_train(ranks, 1, again)[0].losses) == 1


def test_a_stage_starts_from_pretrained_weights_with_fresh_progress(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    before = _train(ranks, 1, _config(prefix, steps=2, checkpoint={"save": str(tmp_path)}))[0]
    config = _config(
        prefix,
        steps=1,
        checkpoint={"pretrained_checkpoint": str(tmp_path)},
        training={"freeze_vision": True, "freeze_resampler": True},
    )
    after = _train(ranks, 1, config)[0]
    frozen = [name for name in before.hashes if name.startswith("vision.")]
    assert frozen
    assert {name: after.hashes[name] for name in frozen} == {name: before.hashes[name] for name in frozen}
    assert after.rows[0] == before.rows[0], "the data position starts anew"


def test_going_back_is_refused_where_later_checkpoints_lie(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    """A committed checkpoint is never written to again, so this run could not save what it trains."""
    both = {"save": str(tmp_path), "save_interval": 1}
    _train(ranks, 1, _config(prefix, steps=2, checkpoint=both))
    back = both | {"load": str(store.directory_of(tmp_path, 1))}
    with pytest.raises(RankError, match="holds step 2, and this run goes on from step 1"):
        _train(ranks, 1, _config(prefix, steps=3, checkpoint=back))
    elsewhere = back | {"save": str(tmp_path / "elsewhere")}
    assert len(_train(ranks, 1, _config(prefix, steps=3, checkpoint=elsewhere))[0].losses) == 2


def test_a_run_goes_on_after_a_kill_before_the_tracker_was_written(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    save = {"save": str(tmp_path), "save_interval": 1, "auto_resume": True}
    _train(ranks, 1, _config(prefix, steps=2, checkpoint=save))
    (tmp_path / store.TRACKER).write_text("1\n")
    named = {"load": str(tmp_path)}
    assert len(_train(ranks, 1, _config(prefix, steps=3, checkpoint=named))[0].losses) == 1
    assert len(_train(ranks, 1, _config(prefix, steps=3, checkpoint=save))[0].losses) == 1


def test_a_run_does_not_go_on_with_other_rows(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    save = {"save": str(tmp_path / "run")}
    _train(ranks, 1, _config(prefix, steps=1, checkpoint=save))
    (tmp_path / "other").mkdir()
    other = prepare_tiny(tmp_path / "other", seed=2)
    resumed = save | {"load": save["save"]}
    for changed in (_config(other, steps=2), _config(prefix, steps=2, training={"seed": 7})):
        with pytest.raises(RankError, match="have changed since step 1"):
            _train(ranks, 1, dataclasses.replace(changed, checkpoint=CheckpointConfig(**resumed)))


def test_finetuning_into_the_loaded_directory_is_refused(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    _train(ranks, 1, _config(prefix, steps=1, checkpoint={"save": str(tmp_path)}))
    both = {"save": str(tmp_path), "load": str(tmp_path), "finetune": True}
    with pytest.raises(RankError, match="would start over"):
        _train(ranks, 1, _config(prefix, steps=2, checkpoint=both))


def test_a_checkpoint_of_another_model_is_refused(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    _train(ranks, 1, _config(prefix, steps=1, checkpoint={"save": str(tmp_path)}))
    config = _config(prefix, steps=2, checkpoint={"load": str(tmp_path)})
    language = dataclasses.replace(config.model.language, num_layers=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, language=language))
    with pytest.raises(RankError, match="language.num_layers is 4 in the checkpoint and 2 in this run"):
        _train(ranks, 1, config)


def _train_and_listen(start: Start, config: RunConfig, level: int) -> list[str]:
    with heard(level) as messages:
        train_on_rank(start, config)
    return messages


def test_moments_that_a_resume_drops_are_told_of(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    save = {"save": str(tmp_path), "auto_resume": True}
    _train(ranks, 1, _config(prefix, steps=1, checkpoint=save))
    for steps, told in ((2, 1), (3, 0)):
        config = _config(prefix, steps=steps, checkpoint=save, training={"freeze_vision": True})
        (warnings,) = ranks(1).run(_train_and_listen, config, logging.WARNING)
        assert len(warnings) == told
        said = r"MOMENTS DROPPED: \d+ tensors of vision trained before .*iter_0000001 and are frozen now"
        assert all(re.match(said, warning) for warning in warnings)


def test_a_run_without_a_save_directory_says_twice_that_it_is_lost(ranks: RankPools, prefix: str) -> None:
    (warnings,) = ranks(1).run(_train_and_listen, _config(prefix, steps=2), logging.WARNING)
    assert [line for line in warnings if set(line) != {"!"}] == [
        "THE 2 STEPS OF THIS RUN WILL BE LOST: --save names no directory, so no checkpoint is written",
        "WHAT THIS RUN HAS TRAINED IS LOST: --save names no directory, so no checkpoint is written",
    ]


def test_a_run_with_nothing_left_to_do_says_so(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    save = {"save": str(tmp_path), "auto_resume": True}
    _train(ranks, 1, _config(prefix, steps=2, checkpoint=save))
    for steps in (2, 1):
        (messages,) = ranks(1).run(_train_and_listen, _config(prefix, steps=steps, checkpoint=save), logging.INFO)
        assert f"nothing left to do: step 2 is done, and --train-iters is {steps}" in messages
    assert store.steps_in(tmp_path) == [2]
