"""Sorting in runs on disk beside Python's own sort, with runs of a few rows."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.prepare import sorted_runs
from megatron_vl.data.prepare.sorted_runs import FirstUses, SortedRuns, Table, scratch_folder

NUMBER = st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1])
ROWS = st.lists(st.lists(st.tuples(NUMBER, NUMBER, st.integers(0, 5)), max_size=12), max_size=6)


def table(rows: list[tuple[int, ...]], width: int) -> Table:
    return np.array(rows, dtype=np.uint64).reshape(-1, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 200))
def test_rows_come_back_in_order_with_equal_first_numbers_together(
    folder: Path, groups: list[list[tuple[int, ...]]], run_bytes: int
) -> None:
    with mock.patch.object(sorted_runs, "RUN_BYTES", run_bytes):
        runs = SortedRuns(folder / "rows", 3)
        for group in groups:
            runs.add(table(group, 3))
        chunks = [chunk.tolist() for chunk in runs.chunks()]
    assert [tuple(row) for chunk in chunks for row in chunk] == sorted(row for group in groups for row in group)
    firsts = [{row[0] for row in chunk} for chunk in chunks]
    assert sum(map(len, firsts)) == len(set().union(*firsts)), "a first number is in two chunks"
    assert not list(folder.iterdir())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), max_size=60), st.integers(1, 400))
def test_the_first_of_each_key_is_found(folder: Path, keys: list[tuple[int, int]], run_bytes: int) -> None:
    repeated: list[int] = []
    with mock.patch.object(sorted_runs, "RUN_BYTES", run_bytes):
        uses = FirstUses(
            folder / "uses", key_width=2, width=4, repeated=lambda numbers: repeated.extend(numbers.tolist())
        )
        for number, key in enumerate(keys):
            uses.add(table([(*key, number, number + 7)], 4))
        found = [tuple(row) for chunk in uses.firsts() for row in chunk.tolist()]
    firsts = {key: keys.index(key) for key in keys}
    assert found == [(*key, number, number + 7) for key, number in sorted(firsts.items())]
    assert sorted(repeated) == [number for number, key in enumerate(keys) if firsts[key] != number]


def test_a_run_holds_no_key_twice(folder: Path) -> None:
    """A million samples with one image make no million rows on the disk."""
    with mock.patch.object(sorted_runs, "RUN_BYTES", 320):
        uses = FirstUses(folder / "same", key_width=1, width=2, repeated=lambda numbers: None)
        for begin in range(0, 2000, 20):
            numbers = np.arange(begin, begin + 20, dtype=np.uint64)
            uses.add(np.stack([np.full(20, 5, dtype=np.uint64), numbers], axis=1))
        files = list(folder.iterdir())
        assert len(files) == 100 and {path.stat().st_size for path in files} == {16}
        assert [chunk.tolist() for chunk in uses.firsts()] == [[[5, 0]]]


def test_the_folder_is_empty_at_the_start_and_gone_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "sorting").mkdir()
    (tmp_path / "sorting" / "left-0.run").write_bytes(b"of a killed process")
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "sorting") as scratch:
        assert not list(scratch.iterdir())
        (scratch / "rows-0.run").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
