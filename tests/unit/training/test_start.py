"""What ``--check`` refuses of a checkpoint, from its small files and without torch, and what ranks refuse first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.config.load import dump_config
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.training.resume import hold_save_directory
from megatron_vl.training.start import check_start, choose_start
from tests.helpers.ranks import RankPools, Start

TINY = RunConfig(model=PRESETS["tiny"])
ROWS = "0123456789ab"


def _commit(root: Path, step: int, *, config: RunConfig = TINY, state: dict[str, Any] | None = None) -> Path:
    staging = store.open_staging(root, step)
    (staging / store.CONFIG).write_text(dump_config(config), encoding="utf-8")
    (staging / "state.json").write_text(json.dumps(state or {"step": step, "data": ROWS}), encoding="utf-8")
    files = [store.record_file(path) for path in sorted(staging.iterdir())]
    return store.commit(staging, root, step=step, files=files, facts={})


def _check(config: RunConfig = TINY, data: str = ROWS, **checkpoint: Any) -> None:
    check_start(dataclasses.replace(config, checkpoint=CheckpointConfig(**checkpoint)), data)


def test_a_run_with_fresh_weights_needs_nothing(tmp_path: Path) -> None:
    _check()
    _check(save=str(tmp_path / "new"), auto_resume=True)
    assert choose_start(TINY) is None


@pytest.mark.parametrize("key", ["load", "pretrained_checkpoint"])
def test_a_checkpoint_that_is_named_must_be_there_and_of_this_model(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        _check(**{key: str(tmp_path / "absent")})
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        _check(**{key: str(tmp_path)})
    path = _commit(tmp_path, 5)
    _check(**{key: str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"of another model: .*language.num_layers is 3 in the checkpoint and 8"):
        _check(RunConfig(model=PRESETS["small"]), **{key: str(path)})
    (path / store.CONFIG).write_text("model: {}\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        _check(**{key: str(tmp_path)})


def test_progress_must_fit_the_data_and_the_save_directory(tmp_path: Path) -> None:
    first = _commit(tmp_path, 5)
    _commit(tmp_path, 9)
    with pytest.raises(CheckpointError, match="have changed since step 9"):
        _check(data="other", load=str(tmp_path))
    _check(data="other", load=str(tmp_path), finetune=True)
    _check(data="other", pretrained_checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds step 9, and this run goes on from step 5"):
        _check(load=str(first), save=str(tmp_path))
    with pytest.raises(CheckpointError, match="would start over: add --auto-resume"):
        _check(save=str(tmp_path))


def test_a_save_directory_holds_one_run(tmp_path: Path) -> None:
    """``keep_last`` would remove the other run's checkpoints, and ``auto_resume`` fall back on them."""
    first, theirs = _commit(tmp_path / "mine", 5), str(tmp_path / "theirs")
    _commit(tmp_path / "theirs", 3)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints \(newest: step 3\) of another run"):
        _check(load=str(first), save=theirs)
    _check(load=str(first), save=str(tmp_path / "theirs" / ".." / "mine"))
    _check(load=str(tmp_path / "mine"), save=str(tmp_path / "mine"))
    _check(load=str(first), save=str(tmp_path / "new"))
    _check(load=str(first), save=theirs, auto_resume=True)


def test_auto_resume_leaves_a_damaged_newest_checkpoint_to_the_run(tmp_path: Path) -> None:
    _commit(tmp_path, 5)
    newest = _commit(tmp_path, 9)
    _check(save=str(tmp_path), auto_resume=True)
    with pytest.raises(CheckpointError, match="have changed since step 9"):
        _check(data="other", save=str(tmp_path), auto_resume=True)
    (newest / store.CONFIG).write_text("damaged", encoding="utf-8")
    _check(save=str(tmp_path), auto_resume=True)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        _check(load=str(newest))


def test_progress_of_another_version_is_refused(tmp_path: Path) -> None:
    """It is no damage: --auto-resume must not go back behind it."""
    path = _commit(tmp_path, 5, state={"step": 5, "data": ROWS, "invented_later": 1})
    for flags in ({"load": str(path)}, {"save": str(tmp_path), "auto_resume": True}):
        with pytest.raises(CheckpointError, match=r"state\.json: written by another version .*invented_later"):
            _check(**flags)


def _hold(start: Start, folder: Path, own: bool) -> str:
    """Hold a save directory that each rank sees in its own folder, or in one for all."""
    with start.topology(ParallelConfig()) as topology:
        mine = folder / str(topology.rank) if own else folder / "all"
        try:
            with hold_save_directory(dataclasses.replace(TINY, checkpoint=CheckpointConfig(save=str(mine)))):
                return sorted(path.name for path in mine.iterdir())[0]
        except CheckpointError as error:
            return str(error)


def test_a_save_directory_that_machines_do_not_share_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(2).run(_hold, tmp_path, False) == [".lock", ".lock"]
    for told in ranks(2).run(_hold, tmp_path, True):
        assert "is not the same directory to ranks 1 as to rank 0" in told
    assert [path.name for path in (tmp_path / "0").iterdir()] == [".lock"]
