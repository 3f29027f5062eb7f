"""Images that repeat, beside comparing every sample with every other, with runs of a few rows on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.prepare import gather as gathering
from megatron_vl.data.prepare import sorted_runs
from megatron_vl.data.prepare.gather import count_drops, gather
from megatron_vl.data.prepare.image_drops import DROPS
from tests.helpers.data.part_indices import MadeUp, digest, part_index

LOOKS = [0, 0b1, 0b11, 0b111, 0xFFFF, 0xFFFE, 2**63]
IMAGES = st.integers(0, 19).map(lambda number: (number, LOOKS[number % len(LOOKS)]))
SAMPLE = st.lists(IMAGES, max_size=2).map(lambda images: MadeUp(images=tuple(images)))
PART = st.tuples(st.integers(0, 2), st.lists(SAMPLE, max_size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drops")
    lines = [digest(3).hex(), f"{0b111:016x}"]
    (folder / "benchmark.txt").write_text("\n".join(lines) + "\n")
    (folder / "scratch").mkdir()
    return folder


def plainly(parts: list[tuple[int, list[MadeUp]]], filters: list[FilterOptions]) -> list[int]:
    """Fates by comparing each sample with all that stay before it."""
    of_near = [item.duplicate_distance for item in filters if item.duplicates == "near"]
    fates: list[int] = []
    files: set[int] = set()
    looks: list[int] = []
    for source, samples in parts:
        for sample in samples:
            options, fate = filters[source], 0
            images = sample.images
            if options.benchmark_images and any(
                number == 3 or (look and (look ^ 0b111).bit_count() <= options.benchmark_distance)
                for number, look in images
            ):
                fate = 1
            elif options.duplicates != "keep" and len(images) == 1:
                ((number, look),) = images
                if number in files:
                    fate = 2
                elif options.duplicates == "near" and look:
                    fate = 3 if any((look ^ other).bit_count() <= max(of_near) for other in looks) else 0
                    looks += [] if fate else [look]
                files.add(number)
            fates.append(fate)
    return fates


FILTERS: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    duplicates=st.sampled_from(["keep", "exact", "near"]),
    duplicate_distance=st.integers(0, 3),
    benchmark=st.booleans(),
    benchmark_distance=st.integers(0, 2),
)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(st.lists(PART, min_size=1, max_size=6), st.lists(FILTERS, min_size=3, max_size=3), st.integers(1, 300))
def test_fates_are_those_of_comparing_all(
    folder: Path, parts: list[tuple[int, list[MadeUp]]], chosen: list[dict[str, Any]], run_bytes: int
) -> None:
    filters = [
        FilterOptions(
            benchmark_images=folder / "benchmark.txt" if item.pop("benchmark") else None,
            **item,
        )
        for item in map(dict, chosen)
    ]
    parts = sorted(parts, key=lambda part: part[0])
    with (
        mock.patch.object(sorted_runs, "RUN_BYTES", run_bytes),
        mock.patch.object(gathering, "_IMAGES_AT_A_TIME", 1 + run_bytes % 12),
    ):
        made = ((source, folder / "part", part_index(samples)) for source, samples in parts)
        gathered = gather(made, filters, folder / "scratch")
    expected = plainly(parts, filters)
    assert gathered.fates.of(0, len(expected)).tolist() == expected
    assert not list((folder / "scratch").iterdir())
    with mock.patch.object(gathering.Parts, "keys", lambda _, numbers: [str(number) for number in numbers]):
        staying = count_drops(gathered)
    begins = np.cumsum([0, *(len(samples) for _, samples in parts)]).tolist()
    assert staying.tolist() == [expected[a:b].count(0) for a, b in zip(begins[:-1], begins[1:], strict=True)]
    for source, counts in enumerate(gathered.all_counts):
        mine = [
            n for (s, _), a, b in zip(parts, begins[:-1], begins[1:], strict=True) if s == source for n in range(a, b)
        ]
        for fate, dropped in enumerate(DROPS, start=1):
            numbers = [number for number in mine if expected[number] == fate]
            assert counts.skips.get(dropped.reason, 0) == len(numbers)
            assert counts.examples.get(dropped.reason, []) == [str(number) for number in numbers[:5]]


@pytest.mark.parametrize("run_bytes", [1, 2**20])
def test_an_image_stays_if_those_like_it_are_dropped(folder: Path, run_bytes: int) -> None:
    """Of hashes one bit apart, 1, 11, 111, 1111, every other one stays; the order of the samples decides."""
    looks = [0b1, 0b11, 0b111, 0b1111, 0b11]
    samples = [MadeUp(images=((number, look),)) for number, look in enumerate(looks)]
    filters = [FilterOptions(duplicates="near", duplicate_distance=1)]
    for order, expected in (([0, 1, 2, 3, 4], [0, 3, 0, 3, 3]), ([1, 3, 0, 4, 2], [0, 0, 3, 3, 3])):
        made = (0, folder / "part", part_index([samples[number] for number in order]))
        with mock.patch.object(sorted_runs, "RUN_BYTES", run_bytes):
            gathered = gather([made], filters, folder / "scratch")
        assert gathered.fates.of(0, 5).tolist() == expected
