"""An error of one rank, whatever it is, ends all ranks at once; the rank that has it shows it, the others name it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vl.checkpoint import contents, store, verification
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.errors import CheckpointError, DataError, ExitStatus, MegatronVLError, PeerError
from megatron_vl.model.build import build_model
from megatron_vl.parallel.agreement import by_all, by_rank_0, together
from megatron_vl.training import feed, resume
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config

AT_ONCE_S = 10.0
"""Far below any time-out of a collective, and far above what the exchange takes."""
BUG = KeyError("a bug")


def _answers(start: Start) -> tuple[int, list[int], int]:
    with start.topology(ParallelConfig()) as topology:
        return together(lambda: topology.rank), by_all(lambda: 10 * topology.rank), by_rank_0(lambda: topology.rank + 7)


def test_what_ranks_give_reaches_all(ranks: RankPools) -> None:
    assert ranks(2).run(_answers) == [(0, [0, 10], 7), (1, [0, 10], 7)]


def _failure(start: Start, errors: dict[int, Exception]) -> tuple[str, str]:
    """What a rank raises where some ranks fail; a collective that follows would show one that was left behind."""

    def act() -> None:
        if topology.rank in errors:
            raise errors[topology.rank]

    with start.topology(ParallelConfig()) as topology:
        try:
            together(act)
        except Exception as error:  # noqa: BLE001 - whatever it is, is compared
            return type(error).__name__, str(error)
        return "none", ""


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            {1: DataError("x.bin: torn")},
            [("DataError", "rank 1: x.bin: torn"), ("DataError", "x.bin: torn")],
        ),
        (
            {0: OSError(28, "No space left on device", "x")},
            [("OSError", "[Errno 28] No space left on device: 'x'"),
             ("MegatronVLError", "rank 0: x: No space left on device")],
        ),
        (
            {1: BUG},
            [("PeerError", "rank 1 has failed by a bug and shows its traceback; all other ranks end with it"),
             ("KeyError", "'a bug'")],
        ),
        (
            {0: DataError("this"), 1: DataError("that")},
            [("DataError", "this"), ("DataError", "that")],
        ),
    ],
    ids=["a user's error", "the machine's", "a bug", "both"],
)  # fmt: skip
def test_every_rank_raises(ranks: RankPools, errors: dict[int, Exception], expected: list[tuple[str, str]]) -> None:
    assert ranks(2).run(_failure, errors) == expected


def test_the_status_of_a_peer_is_that_of_a_bug() -> None:
    assert PeerError("x").exit_status == ExitStatus.BUG and issubclass(PeerError, MegatronVLError)


def _end_of(start: Start, config: RunConfig, root: Path, place: str, rank: int) -> tuple[str, bool]:
    """The error of this rank where a bug is met at ``place`` on one rank; and whether it came at once."""
    broken = {
        "start": mock.patch.object(resume, "choose_start", side_effect=BUG),
        "hold": mock.patch.object(resume.folder_lock, "hold", side_effect=BUG),
        "verify": mock.patch.object(store, "verify_contents", side_effect=BUG),
        "staging": mock.patch.object(store, "open_staging", side_effect=BUG),
        "records": mock.patch.object(store, "record_file", side_effect=BUG),
        "commit": mock.patch.object(store, "commit", side_effect=BUG),
        "same model": mock.patch.object(contents, "check_same_model", side_effect=BUG),
        "streams": mock.patch.object(contents.rng, "load_state_dict", side_effect=BUG),
        "data": mock.patch.object(feed, "RowLoader", side_effect=BUG),
    }
    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        path = contents.save(trained, {"step": 1}, config=config, topology=topology, root=root)

        def hold() -> None:
            with resume.hold_save_directory(tiny_config(checkpoint={"save": str(root)})):
                pass

        def save() -> None:
            contents.save(trained, {"step": 2}, config=config, topology=topology, root=root)

        def load() -> None:
            contents.load(trained, verification.Verified(path), config=config, topology=topology)

        calls: dict[str, Any] = {
            "start": lambda: resume.find_start(config, topology),
            "hold": hold,
            "verify": lambda: verification.verify_together(path, topology),
            "staging": save,
            "records": save,
            "commit": save,
            "same model": load,
            "streams": load,
            "data": lambda: feed.open_feed(config, topology, data_path=("nothing",)),
        }
        began = time.monotonic()
        with broken[place] if topology.rank == rank else mock.MagicMock():
            try:
                calls[place]()
            except Exception as error:  # noqa: BLE001 - whatever it is, is compared
                return type(error).__name__, time.monotonic() - began < AT_ONCE_S
        return "none", True


@pytest.mark.parametrize(
    ("place", "rank"),
    [("start", 0), ("hold", 0), ("verify", 0), ("verify", 1), ("staging", 0), ("records", 1), ("commit", 0),
     ("same model", 1), ("streams", 0), ("data", 0)],
)  # fmt: skip
def test_a_bug_of_one_rank_ends_both(ranks: RankPools, tmp_path: Path, place: str, rank: int) -> None:
    """Where a rank works alone while the other one waits for it; the reason is said by one."""
    config = tiny_config(parallel={"tensor_model_parallel_size": 2})
    ends = ranks(2).run(_end_of, config, tmp_path, place, rank)
    assert ends[rank] == ("KeyError", True)
    assert ends[1 - rank] == ("PeerError", True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".staging")] == []


def test_a_refusal_of_rank_0_is_passed_on_with_its_words(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks(2).run(_refused, tiny_config(checkpoint={"load": str(tmp_path / "nothing")}))
    assert "nothing" in found[0]
    assert found[1] == f"rank 0: {found[0]}"


def _refused(start: Start, config: RunConfig) -> str:
    with start.topology(config.parallel) as topology, pytest.raises(CheckpointError) as caught:
        resume.find_start(config, topology)
    return str(caught.value)
