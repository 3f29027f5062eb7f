"""Memory of planning a data set: a byte for each sample, and the numbers of one block.

    python benchmarks/planning.py [--samples 5000000 20000000] [--block-samples 2097152] [--json FILE] [--smoke]

What is planned is made up: indices of parts as the workers write them, of the stream of ``packing.py`` in four sources,
with sparse files in place of tokens and images. Filters ask for similar images, so that everything is sorted that can
be. Planning runs in a process of its own, from the first part to the last stored slice; its resident memory is read
twenty times a second. Two numbers of samples in blocks of the same size give the bytes that each further sample takes.
They sort a little at a time, so that both need files, and give back to the system what they free, so that the holes of
the C library's heap are not counted as growth. A third run is one full block with the usual settings. From these
follows the peak of 1.4 thousand million samples.

The default takes some 4 GB in ``--folder``, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measure import Row, describe_machine, write_rows
from stream import IMAGE, ROW, make_stream

from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.prepare import sorted_runs
from megatron_vl.data.prepare.merge import FinishedPart, merge_parts
from megatron_vl.data.prepare.part_files import KEPT, data_path, index_path, read_index
from megatron_vl.data.prepare.recipe import DataRecipe, PackOptions, SourceEntry
from megatron_vl.data.prepare.stored_plan import store_slices
from megatron_vl.data.sample import TASKS
from megatron_vl.data.sources.text import Text

_PART = 10_000
"""Samples of a part, as img2dataset makes them."""
NUM_SOURCES = 4
PAPER = 1_400_000_000
MOST_GB = 16.0
MOST_HERE_GB = 12.0
_EVERY_SECONDS = 0.05
_IMAGE_BYTES = 45_000
_RUN_BYTES = 2**24
"""Bytes that the first two runs sort at a time."""
_KEY_BYTES = 20
_REPEATED = 0.01
"""Share of the images that are among the same few."""
_NUM_POINTS = 24
"""Points of a curve that are printed."""
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
"""By default, the thresholds grow with what is freed, and tens of megabytes stay with the process."""


@dataclass(frozen=True)
class _Settings:
    """How a planning is run."""

    block: int
    part: int
    run_bytes: int = sorted_runs.RUN_BYTES
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What was seen of one planning."""

    samples: int
    seconds: float
    curve: tuple[tuple[float, float], ...]
    """Seconds since the start, resident GB."""
    marks: dict[str, float]
    """Seconds since the start at which a phase has ended."""
    facts: dict[str, int]

    def peak(self, begin: str | None = None, end: str | None = None) -> float:
        """Return the largest GB between two marks."""
        low = self.marks[begin] if begin else 0.0
        high = self.marks[end] if end else self.seconds
        return max((size for at, size in self.curve if low <= at <= high), default=0.0)


def main() -> None:
    """Make the parts, plan them, and print a curve for each run and a line for each comparison."""
    options = _parse()
    if options.plan:
        _plan(options)
        return
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="planning-", dir=options.folder) as folder:
        most = max(*options.samples, options.full_block)
        begin = time.monotonic()
        make_parts(Path(folder), most, options.part)
        print(f"made the parts of {most:,} samples in {time.monotonic() - begin:.0f} s", flush=True)
        watched = _Settings(options.block_samples, options.part, options.run_bytes, _GIVE_BACK)
        small, large = (_run(Path(folder), count, watched) for count in sorted(options.samples))
        full = _run(Path(folder), options.full_block, _Settings(options.full_block, options.part))
    rows = compare(small, large, full)
    for row in rows:
        verdict = "" if row.met is None else f"; goal <= {row.goal:.2f}: {'met' if row.met else 'MISSED'}"
        print(f"{row.name}: {row.ours:.3g} and {row.reference:.3g}; ratio {row.ratio:.3f}{verdict}")
    if options.json:
        write_rows(options.json, rows)


def compare(small: Run, large: Run, full: Run) -> list[Row]:
    """Return the comparisons. Each run has a mark ``gathered`` between its two halves."""
    more = large.samples - small.samples
    halves: list[dict[str, str]] = [{"end": "gathered"}, {"begin": "gathered"}]
    slopes = [1e9 * (large.peak(**half) - small.peak(**half)) / more for half in halves]
    resident = max(*slopes, 1.0)  # noise may hide the byte that each sample has
    gathering, planning = (full.peak(**half) for half in halves)
    paper = max(gathering, planning) + resident * (PAPER - full.samples) / 1e9
    print(f"bytes a further sample: {slopes[0]:.2f} while parts are gathered, {slopes[1]:.2f} while blocks are planned")
    print(
        f"{PAPER:,} samples: {gathering:.2f} GB to gather or {planning:.2f} GB to plan {full.samples:,} in one block, "
        f"and {resident:.2f} bytes of every other sample: {paper:.2f} GB"
    )
    return [
        _row(f"GB, peak of planning {large.samples:,} samples; reference the limit", large.peak(), MOST_HERE_GB),
        _row(f"GB, peak of one block of {full.samples:,}; reference the limit", full.peak(), MOST_HERE_GB),
        _row("bytes a further sample; reference 16 GB for 1.4e9", resident, MOST_GB * 1e9 / PAPER),
        _row("GB, 1.4e9 samples, computed; reference the limit", paper, MOST_GB),
        Row(f"seconds, {large.samples:,} samples; reference one full block", large.seconds, full.seconds,
            large.seconds / full.seconds, None, None),
    ]  # fmt: skip


def _row(name: str, ours: float, reference: float) -> Row:
    return Row(name, ours, reference, ours / reference, 1.0, ours <= reference)


def make_parts(folder: Path, count: int, part: int) -> None:
    """Write the indices of parts of ``count`` samples, and sparse files of their sizes."""
    repeated = np.random.default_rng(1).integers(0, 256, (10_000, 32), dtype=np.uint8)
    for number, begin in enumerate(range(0, count, part)):
        size = min(part, count - begin)
        columns, num_bytes = _part_columns(np.random.default_rng([2, number]), size, repeated)
        np.savez(index_path(_prefix(folder, number)), allow_pickle=False, **columns)
        with data_path(_prefix(folder, number)).open("wb") as file:
            file.truncate(num_bytes)


def _part_columns(rng: np.random.Generator, size: int, repeated: Any) -> tuple[dict[str, Any], int]:
    """Return the columns of a part of ``size`` samples and the size of its data. The stream's kinds are shuffled."""
    stream = make_stream(size)
    order = rng.permutation(size)
    lengths, images, is_text = stream.lengths[order], stream.images[order], stream.is_text[order]
    num_images = int(images.sum())
    digests = rng.integers(0, 256, (num_images, 32), dtype=np.uint8)
    again = rng.random(num_images) < _REPEATED
    digests[again] = repeated[rng.integers(0, len(repeated), int(again.sum()))]
    sizes = 4 * lengths + _KEY_BYTES + images * _IMAGE_BYTES
    ends = np.cumsum(sizes)
    header = {
        "size": int(ends[-1]), "reasons": [], "num_scored": 0, "largest_token": 1000, "examples": [],
    }  # fmt: skip
    first = np.repeat(ends - sizes, images)
    rank = np.arange(num_images) - np.repeat(np.cumsum(images) - images, images)
    columns = {
        "outcomes": np.full(size, KEPT, np.int16),
        "tasks": np.where(is_text, TASKS.index("text"), np.minimum(images, 2)).astype(np.int8),
        "offsets": ends - 4 * lengths - _KEY_BYTES,
        "lengths": lengths.astype(np.int32),
        "key_sizes": np.full(size, _KEY_BYTES, np.int32),
        "image_counts": images.astype(np.int16),
        "image_ids": np.arange(num_images, dtype=np.int32),
        "image_offsets": first + rank * _IMAGE_BYTES,
        "image_sizes": np.full(num_images, _IMAGE_BYTES, np.int32),
        "dhashes": np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1),
        "digests": digests.reshape(-1),
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
    }
    return columns, int(ends[-1])


def _run(folder: Path, count: int, settings: _Settings) -> Run:
    """Plan the first ``count`` samples in a process of its own, and watch its memory."""
    command = [sys.executable, __file__, "--plan", str(folder), "--samples", str(count), str(count)]
    command += ["--block-samples", str(settings.block), "--part", str(settings.part)]
    command += ["--run-bytes", str(settings.run_bytes)]
    begin = time.monotonic()
    curve = []
    environment = {**os.environ, **settings.environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            curve.append((time.monotonic() - begin, _resident_gb(process.pid)))
            time.sleep(_EVERY_SECONDS)
        assert process.stdout is not None
        found = json.loads(process.stdout.read()) if process.returncode == 0 else None
    if found is None:
        raise SystemExit(f"planning {count:,} samples failed")
    marks = {name: at - begin for name, at in found.pop("marks").items()}
    run = Run(count, time.monotonic() - begin, tuple(curve), marks, found)
    _print_curve(run, settings.block)
    return run


def _resident_gb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0  # it has just ended


def _print_curve(run: Run, block: int) -> None:
    facts = ", ".join(f"{value:,} {name}" for name, value in run.facts.items())
    print(f"\n{run.samples:,} samples in blocks of at most {block:,}: {facts}; {run.seconds:.0f} s")
    top = max(run.peak(), 1e-9)
    step = run.seconds / _NUM_POINTS
    for point in range(_NUM_POINTS):
        sizes = [size for at, size in run.curve if point * step <= at < (point + 1) * step]
        if sizes:
            phase = "gather" if (point + 0.5) * step < run.marks["gathered"] else "plan"
            print(f"{(point + 1) * step:7.1f} s {phase:<7} {max(sizes):6.2f} GB {'#' * round(50 * max(sizes) / top)}")
    print(f"peak {run.peak(end='gathered'):.2f} GB to gather, {run.peak(begin='gathered'):.2f} GB to plan", flush=True)


def _plan(options: argparse.Namespace) -> None:
    """Plan in this process, and print what came of it as JSON."""
    folder, count = Path(options.plan), options.samples[0]
    sorted_runs.RUN_BYTES = options.run_bytes
    filters = FilterOptions(duplicates="near", duplicate_distance=1)
    sources = tuple(SourceEntry(Text(f"s{number}", path=folder), filters=filters) for number in range(NUM_SOURCES))
    pack = PackOptions(block_samples=options.block_samples)
    recipe = DataRecipe(sources, num_queries=IMAGE - 2, num_bpe_tokens=2000, seq_length=ROW, pack=pack)
    place = folder / f"plan-{count}-{options.block_samples}"
    place.mkdir()
    merged = merge_parts(recipe, _parts(folder, count, options.part), place)
    marks = {"gathered": time.monotonic()}
    slices = store_slices(merged.slices(), place)
    manifest = merged.manifest()
    facts = {"blocks": merged.num_blocks, "samples drawn": manifest.num_samples, "rows": manifest.num_rows}
    print(json.dumps({"marks": marks, **facts, "slices": len(slices)}))
    for path in place.iterdir():
        path.unlink()


def _parts(folder: Path, count: int, part: int) -> Iterator[FinishedPart]:
    """Yield the parts of the first ``count`` samples, in four sources of about equal size."""
    num_parts = -(-count // part)
    for number in range(num_parts):
        index = read_index(_prefix(folder, number))
        assert index is not None
        yield FinishedPart(number * NUM_SOURCES // num_parts, _prefix(folder, number), index)


def _prefix(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples",
        nargs=2,
        type=int,
        default=[5_000_000, 20_000_000],
        help="two numbers of samples, of at least two million",
    )
    parser.add_argument("--block-samples", type=int, default=2**21, help="samples of a block in these two runs")
    parser.add_argument("--full-block", type=int, default=_default_block(), help="samples of the run with one block")
    parser.add_argument("--folder", type=Path, help="where the parts are made (default: that of temporary files)")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="few samples: shows that it runs")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=_PART, help=argparse.SUPPRESS)
    parser.add_argument("--run-bytes", type=int, default=_RUN_BYTES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.block_samples, options.full_block = [20_000, 60_000], 8_192, 40_000
        options.part, options.run_bytes = 2_000, 2**19
    return options


def _default_block() -> int:
    """Return the samples of a full block of the default size, in whole parts."""
    return PackOptions().block_samples // _PART * _PART


if __name__ == "__main__":
    main()
