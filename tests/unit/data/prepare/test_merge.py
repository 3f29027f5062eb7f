"""Rows of made-up parts, in blocks of any size, beside the samples that they are to hold."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.dataset.manifest import BlockEntry, Manifest, block_name
from megatron_vl.data.prepare import row_plan
from megatron_vl.data.prepare.gather import Parts
from megatron_vl.data.prepare.merge import FinishedPart, Progress, merge_parts
from megatron_vl.data.prepare.mixture import uses_before
from megatron_vl.data.prepare.recipe import DataRecipe, PackOptions, SourceEntry
from megatron_vl.data.prepare.row_slices import RowSlice
from megatron_vl.data.sample import TASKS
from megatron_vl.data.sources.text import Text
from tests.helpers.data.part_indices import MadeUp, part_index

ROW = 16
TEXT = TASKS.index("text")
IMAGES = st.lists(st.integers(0, 9).map(lambda number: (number, 0)), max_size=3).map(tuple)
WHOLE = st.builds(MadeUp, length=st.integers(1, ROW), images=IMAGES, task=st.integers(0, 2))
DOCUMENT = st.builds(MadeUp, length=st.integers(1, 3 * ROW), task=st.just(TEXT))
PARTS = st.lists(st.tuples(st.integers(0, 2), st.lists(WHOLE | DOCUMENT, max_size=6)), max_size=6)
Rows = list[list[tuple[int, int, int, int]]]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    PARTS,
    st.lists(st.sampled_from([0.4, 1.0, 1.5, 3.0]), min_size=3, max_size=3),
    st.integers(1, 15),
    st.sampled_from(["mixed", "task", "none"]),
)
def test_rows_of_all_blocks_hold_what_is_drawn(
    made_up: list[tuple[int, list[MadeUp]]], weights: list[float], most: int, mode: Any
) -> None:
    # A sample in every source, since a source that gives nothing is refused.
    parts = sorted([*made_up, *((source, [MadeUp(length=3)]) for source in range(3))], key=lambda part: part[0])
    expected = _drawn(parts, weights)
    if not expected:
        return
    recipe = _recipe(weights, PackOptions(mode=mode, max_images=4, min_piece=2, block_samples=most))
    slices, manifest = _plan(recipe, parts)
    blocks: dict[str, list[RowSlice]] = {}
    for work in slices:
        blocks.setdefault(work.block, []).append(work)
    assert len(blocks) == -(-sum(expected.values()) // most) == max(len(manifest.blocks), 1)
    found: Counter[tuple[int, int]] = Counter()
    for number, members in enumerate(blocks.values()):
        rows, num_stored = _read(members, parts)
        for row in rows:
            assert sum(stop - start for _, _, start, stop in row) <= ROW
            assert sum(len(parts[part][1][place].images) for part, place, _, _ in row) <= 4
            assert mode != "task" or len({parts[part][1][place].task for part, place, _, _ in row}) == 1
        covered = Counter((part, place, token) for row in rows for part, place, a, b in row for token in range(a, b))
        mine = Counter({(part, place): times for (part, place, token), times in covered.items() if token == 0})
        assert sum(mine.values()) <= most, "a block is larger than it may be"
        for (part, place), times in mine.items():
            length = parts[part][1][place].length
            assert all(covered[part, place, token] == times for token in range(length)), "a token is lost or doubled"
        found += mine
        if manifest.blocks:
            assert manifest.blocks[number] == BlockEntry(len(rows), num_stored)
    assert found == expected
    _check_manifest(manifest, expected, parts)


def test_blocks_mix_the_sources() -> None:
    """Two sources, one after the other in the parts: each block has half of its samples from either."""
    parts = [(0, [MadeUp(length=5)] * 12), (1, [MadeUp(length=5, task=1)] * 12)]
    slices, manifest = _plan(_recipe([1.0, 1.0], PackOptions(block_samples=8)), parts)
    assert len(manifest.blocks) == 3
    for work in slices:
        assert work.source.tolist().count(0) == work.source.tolist().count(1) == 4
        assert any(len(set(work.source[a:b].tolist())) == 2 for a, b in itertools.pairwise(work.row_splits))


def test_progress_is_told_block_by_block() -> None:
    told: list[tuple[int, int]] = []
    _plan(
        _recipe([1.0], PackOptions(block_samples=4)),
        [(0, [MadeUp(length=5)] * 12)],
        report=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_equal_blocks_are_not_in_the_same_random_order() -> None:
    parts = [(0, [MadeUp(length=5)] * 60)]
    slices, _ = _plan(_recipe([1.0], PackOptions(block_samples=30)), parts)
    orders = [
        np.concatenate([work.offset for work in slices if work.block == block_name(number, 2)]) for number in range(2)
    ]
    first, second = (order - order.min() for order in orders)
    assert sorted(first) == sorted(second) and first.tolist() != second.tolist()


def test_one_block_is_as_without_blocks() -> None:
    parts = [(0, [MadeUp(length=3 + number % 5, images=((number, 0),)) for number in range(40)])]
    names = []
    for most in (40, 2**24):
        slices, manifest = _plan(_recipe([1.0], PackOptions(block_samples=most)), parts)
        assert manifest.blocks == () and manifest.format_version == 4 and "blocks" not in manifest.to_json()
        names.append([work.name for work in slices])
    assert names[0] == names[1]


def _recipe(weights: list[float], pack: PackOptions) -> DataRecipe:
    sources = tuple(
        SourceEntry(Text(f"source{number}", path=Path("unused")), weight=weight)
        for number, weight in enumerate(weights)
    )
    return DataRecipe(sources, num_queries=4, num_bpe_tokens=100, seq_length=ROW, pack=pack)


def _plan(
    recipe: DataRecipe, parts: list[tuple[int, list[MadeUp]]], report: Progress = lambda done, total: None
) -> tuple[list[RowSlice], Manifest]:
    finished = [
        FinishedPart(source, Path(f"part{number}"), part_index(samples))
        for number, (source, samples) in enumerate(parts)
    ]
    with (
        mock.patch.object(Parts, "read", lambda _, part: finished[part].index),
        mock.patch.object(Parts, "keys", lambda _, numbers: [str(number) for number in numbers]),
        mock.patch.object(row_plan, "SLICE_BYTES", 300),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("megatron_vl.data.prepare.merge.scratch_folder", mock.MagicMock())
        merged = merge_parts(recipe, finished, Path("unused"))
        return list(merged.slices(report)), merged.manifest()


def _drawn(parts: list[tuple[int, list[MadeUp]]], weights: list[float]) -> Counter[tuple[int, int]]:
    """How often each sample, given by part and place, is drawn."""
    drawn: Counter[tuple[int, int]] = Counter()
    for source, weight in enumerate(weights):
        mine = [
            (part, place) for part, (s, samples) in enumerate(parts) if s == source for place in range(len(samples))
        ]
        before = uses_before(np.arange(len(mine) + 1), len(mine), int(len(mine) * weight + 1e-9))
        drawn.update(dict(zip(mine, np.diff(before).tolist(), strict=True)))
    return +drawn


def _read(slices: list[RowSlice], parts: list[tuple[int, list[MadeUp]]]) -> tuple[Rows, int]:
    """Read the rows of a block, as (part, place, start, stop) of each segment; check the bytes and the images."""
    rows: Rows = []
    stored: list[tuple[str, int, int]] = []
    token_end = image_end = 0
    for work in slices:
        assert (work.token_begin, work.image_begin) == (token_end, image_end), "slices follow each other"
        places = (work.image_part, work.image_offset, work.image_size)
        for part, offset, size in zip(*(column.tolist() for column in places), strict=True):
            stored.append((work.paths[part].stem, offset, size))
            image_end += size
        for row in range(work.num_rows):
            segments = range(work.row_splits[row], work.row_splits[row + 1])
            columns = (work.part, work.offset, work.start, work.stop)
            read = [tuple(int(column[number]) for column in columns) for number in segments]
            named = [(int(work.paths[part].stem[4:]), offset // 1000, a, b) for part, offset, a, b in read]
            rows.append(named)
            ids = work.image_numbers[work.image_splits[row] : work.image_splits[row + 1]].tolist()
            wanted = [look for part, place, _, _ in named for look in parts[part][1][place].images]
            assert [stored[number][2] - 1 for number in ids] == [number for number, _ in wanted]
            token_end += 4 * (2 + len(named) + len(ids) + sum(stop - start for _, _, start, stop in named))
    assert len({size for _, _, size in stored}) == len(stored), "an image is stored twice in a block"
    return rows, len(stored)


def _check_manifest(
    manifest: Manifest, expected: Counter[tuple[int, int]], parts: list[tuple[int, list[MadeUp]]]
) -> None:
    uses = [(parts[part][0], parts[part][1][place]) for part, place in expected.elements()]
    assert manifest.num_samples == len(uses)
    assert manifest.num_tokens == sum(sample.length for _, sample in uses)
    assert manifest.num_images == sum(len(sample.images) for _, sample in uses)
    assert [totals.kept for totals in manifest.sources] == [
        sum(parts[part][0] == source for part, _ in expected) for source in range(3)
    ]
    counted = Counter((f"source{source}", TASKS[sample.task]) for source, sample in uses)
    assert {(entry.source, entry.task): entry.samples for entry in manifest.counts} == counted
    assert sum(times * count for times, count in enumerate(manifest.images_per_row)) == manifest.num_images
    assert sum(manifest.images_per_row) == manifest.num_rows
