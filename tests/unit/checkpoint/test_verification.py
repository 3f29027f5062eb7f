"""All ranks read one checkpoint, whatever a training saves meanwhile and whatever a machine does not see."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.verification import choose_together, verify_together
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import CheckpointError
from tests.helpers.ranks import RankPools, Start


def _save(root: Path, step: int, text: str = "weights") -> Path:
    staging = store.open_staging(root, step)
    (staging / "__0_0.distcp").write_text(text)
    return store.commit(staging, root, step=step, files=[store.record_file(staging / "__0_0.distcp")], facts={})


def _verify(start: Start, paths: list[Path]) -> str:
    """What this rank is told of its own path."""
    with start.topology(ParallelConfig()) as topology:
        try:
            verify_together(paths[topology.rank], topology)
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        return "whole"


def test_damage_that_one_machine_alone_sees_is_not_called_so(ranks: RankPools, tmp_path: Path) -> None:
    """--auto-resume would rename a sound checkpoint and go back behind it."""
    here, late = _save(tmp_path / "here", 5), tmp_path / "late"
    other = _save(tmp_path / "other", 5, "weight")
    for theirs, found in ((late, "manifest.json: missing"), (other, "a sound checkpoint that is another one")):
        for paths, seen in (([here, theirs], (1, 0)), ([theirs, here], (0, 1))):
            told = ranks(2).run(_verify, paths)
            assert all(text.startswith("CheckpointError: ") for text in told)
            assert "do not see the same files" in told[0] and (found in told[0])
            if theirs == late:
                assert f"rank {seen[0]} finds {late}" in told[1] and f"rank {seen[1]} finds it sound" in told[1]
    (here / "__0_0.distcp").unlink()
    assert all(text.startswith("DamagedCheckpointError") for text in ranks(2).run(_verify, [here, here]))


def _choose(start: Start, root: Path) -> Path:
    """What this rank reads where a training saves step 6 as soon as rank 0 has looked."""
    with start.topology(ParallelConfig()) as topology:
        resolve = store.resolve

        def look(path: Path) -> Path:
            found = resolve(path)
            _save(root, 6)
            return found

        with pytest.MonkeyPatch.context() as patch:
            if topology.rank == 0:
                patch.setattr(store, "resolve", look)
            return choose_together(root, topology).path


def test_all_ranks_read_the_one_that_rank_0_has_chosen(ranks: RankPools, tmp_path: Path) -> None:
    newest = _save(tmp_path, 5)
    assert ranks(2).run(_choose, tmp_path) == [newest, newest]
    assert store.resolve(tmp_path).name == "iter_0000006"
