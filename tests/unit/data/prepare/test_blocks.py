"""Division into blocks, and the columns of a block, beside plain lists."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.prepare.block_samples import Block, join_pieces
from megatron_vl.data.prepare.blocks import Blocks, spread_evenly
from megatron_vl.data.prepare.gather import Gathered, Parts
from megatron_vl.data.prepare.image_drops import Fates
from megatron_vl.data.prepare.mixture import uses_before
from tests.helpers.data.part_indices import MadeUp, part_index

IMAGES = st.lists(st.integers(0, 9).map(lambda number: (number, 0)), max_size=3).map(tuple)
SAMPLE = st.builds(MadeUp, length=st.integers(1, 9), images=IMAGES, task=st.integers(0, 2))
PARTS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.tuples(SAMPLE, st.booleans()), max_size=6)), max_size=6)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 60))
def test_the_first_of_all_elements_are_those_with_the_first_places(counts: list[int], total: int) -> None:
    places = sorted(
        (Fraction(2 * element + 1, 2 * count), index) for index, count in enumerate(counts) for element in range(count)
    )
    total = min(total, len(places))
    firsts = [index for _, index in places[:total]]
    assert spread_evenly(counts, total) == [firsts.count(index) for index in range(len(counts))]


def test_shares_of_the_paper() -> None:
    """1.4 thousand million samples of seven sources: every block has its share, to one sample."""
    counts = [400_000_000, 300_000_000, 105_000_000, 500_000_000, 24_800_000, 7_500_000, 33]
    total, most = sum(counts), 2**24
    blocks = -(-total // most)
    edges = [spread_evenly(counts, total * edge // blocks) for edge in range(blocks + 1)]
    assert blocks == 80 and edges[0] == [0] * 7 and edges[-1] == counts
    for before, after in zip(edges[:-1], edges[1:], strict=True):
        sizes = [stop - start for start, stop in zip(before, after, strict=True)]
        assert total // blocks <= sum(sizes) <= most
        assert all(abs(size - count / blocks) <= 1 for size, count in zip(sizes, counts, strict=True))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(PARTS, st.lists(st.integers(0, 20), min_size=3, max_size=3), st.integers(1, 12))
def test_blocks_have_all_drawn_samples_with_their_images(
    drawn_parts: list[tuple[int, list[tuple[MadeUp, bool]]]], wanted: list[int], most: int
) -> None:
    parts = sorted(drawn_parts, key=lambda part: part[0])
    staying = [[place for place, (_, stays) in enumerate(samples) if stays] for _, samples in parts]
    of_source = [[(p, i) for p, (s, _) in enumerate(parts) if s == source for i in staying[p]] for source in range(3)]
    drawn = [count if members else 0 for count, members in zip(wanted, of_source, strict=True)]
    expected = [
        sample
        for members, count in zip(of_source, drawn, strict=True)
        for sample, copies in zip(
            members, np.diff(uses_before(np.arange(len(members) + 1), len(members), count)).tolist(), strict=True
        )
        for _ in range(copies)
    ]
    blocks = Blocks(_gathered(parts), np.array([len(mine) for mine in staying], np.int64), drawn, most)
    indices = [part_index([sample for sample, _ in samples]) for _, samples in parts]
    found = []
    with mock.patch.object(Parts, "read", lambda _, part: indices[part]):
        for number in range(blocks.number if expected else 0):
            block = join_pieces(blocks.pieces(number))
            assert 1 <= len(block.chosen) <= most
            found += _places(block)
            _check_contents(block, parts)
    assert sorted(found) == expected == sorted(expected)
    of_unused = [set(members) - set(expected) for members in of_source]
    firsts = np.cumsum([0, *(len(samples) for _, samples in parts)])
    for source, members in enumerate(of_unused):
        assert list(blocks.unused(source)) == [int(firsts[part]) + place for part, place in sorted(members)]


def test_one_block_has_the_order_of_the_parts() -> None:
    parts = [(0, [(MadeUp(), True)] * 3), (1, [(MadeUp(), True), (MadeUp(), False), (MadeUp(), True)])]
    blocks = Blocks(_gathered(parts), np.array([3, 2]), [6, 1], 7)
    assert blocks.number == 1
    index = part_index([MadeUp()] * 3)
    with mock.patch.object(Parts, "read", lambda *_: index):
        places = _places(join_pieces(blocks.pieces(0)))
    assert places == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (1, 2)]


def _gathered(parts: list[tuple[int, list[tuple[MadeUp, bool]]]]) -> Gathered:
    fates = Fates()
    sizes = np.array([len(samples) for _, samples in parts], dtype=np.int64)
    fates.extend(int(sizes.sum()))
    gone = [not stays for _, samples in parts for _, stays in samples]
    fates.mark(np.flatnonzero(gone), 2)
    prefixes = tuple(Path(str(number)) for number in range(len(parts)))
    sources = np.array([source for source, _ in parts], dtype=np.int64)
    return Gathered(Parts(prefixes, sources, np.cumsum(sizes) - sizes, sizes), fates, (), 0)


def _places(block: Block) -> list[tuple[int, int]]:
    """Part and place in it of each chosen sample."""
    samples = block.samples
    return [(int(samples.part[index]), int(samples.offset[index]) // 1000) for index in block.chosen.tolist()]


def _check_contents(block: Block, parts: list[tuple[int, list[tuple[MadeUp, bool]]]]) -> None:
    """Every column is that of the sample; equal images have one number, and none is there twice."""
    samples, images = block.samples, block.images
    numbers = []
    for index in range(len(samples)):
        part, place = int(samples.part[index]), int(samples.offset[index]) // 1000
        sample = parts[part][1][place][0]
        ids = samples.image_ids[samples.image_splits[index] : samples.image_splits[index + 1]]
        assert samples.source[index] == parts[part][0]
        assert (samples.length[index], samples.task[index], samples.key_size[index]) == (sample.length, sample.task, 1)
        assert (images.size[ids] - 1).tolist() == [number for number, _ in sample.images]
        numbers += ids.tolist()
    assert len(set(images.size.tolist())) == len(images.size)
    stored_at = list(zip(images.part.tolist(), images.offset.tolist(), strict=True))
    assert sorted(set(numbers)) == list(range(len(images.size))) and stored_at == sorted(stored_at)
    for image in range(len(images.size)):
        stored = list(dict.fromkeys(look for sample, _ in parts[images.part[image]][1] for look in sample.images))
        assert stored[int(images.offset[image]) - 10**6] == (images.size[image] - 1, 0)
