"""Compute the rows of the report's tables from the records; used by the page and by the terminal."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.report.layout_phases import find_layout_phases
from megatron_vl.report.records import StepTime, TrainingRecord

_NUMBER = re.compile(r"[\d,.]+(\s%)?|–")


@dataclass(frozen=True)
class LayoutRow:
    """Throughput of a phase of steps at one layout."""

    stage: str
    layout: str
    first: int
    last: int
    tokens_per_second: float
    images_per_second: float
    gflops_per_rank: float


@dataclass(frozen=True)
class TimeRow:
    """Wall-clock time of a step over all its attempts."""

    step: str
    seconds: float
    attempts: int
    finished: bool


@dataclass(frozen=True)
class DataRow:
    """A packed data set."""

    name: str
    num_rows: int
    num_samples: int
    num_images: int
    num_tokens: int
    fill: float
    """Share of token positions that are not padding."""
    sources: tuple[tuple[str, int], ...]
    """Samples by source and task."""
    skipped: tuple[tuple[str, int], ...]
    """Samples left out, by reason."""
    page: Path | None
    """The output of ``tools/inspect_data.py`` for it, if there is one."""


def data_row(prefix: Path) -> DataRow:
    """Return the row of a packed data set. Raises DataError if it is damaged."""
    manifest, page = read_manifest(prefix), Path(f"{prefix}.html")
    skipped: Counter[str] = Counter()
    for skip in manifest.skips:
        skipped[skip.reason] += skip.count
    return DataRow(
        name=prefix.name,
        num_rows=manifest.num_rows,
        num_samples=manifest.num_samples,
        num_images=manifest.num_images,
        num_tokens=manifest.num_tokens,
        fill=manifest.fill,
        sources=tuple((f"{entry.source} ({entry.task})", entry.samples) for entry in manifest.counts),
        skipped=tuple(skipped.items()),
        page=page if page.exists() else None,
    )


def layout_rows(stage: str, records: Sequence[TrainingRecord]) -> tuple[LayoutRow, ...]:
    """Return one row for each phase at one layout; throughputs are medians over the phase's logged steps."""
    rows = []
    for phase in find_layout_phases(records):
        part = [record for record in records if phase.first <= record.iteration <= phase.last]
        rows.append(
            LayoutRow(
                stage=stage,
                layout=phase.layout,
                first=phase.first,
                last=phase.last,
                tokens_per_second=statistics.median(record.tokens_per_second for record in part),
                images_per_second=statistics.median(record.images_per_second for record in part),
                gflops_per_rank=1000 * statistics.median(record.tflops_per_rank for record in part),
            )
        )
    return tuple(rows)


def time_rows(timings: Sequence[StepTime]) -> tuple[TimeRow, ...]:
    """Sum the attempts at each step, in the order in which the steps first appear."""
    steps = list(dict.fromkeys(timing.step for timing in timings))
    return tuple(_time_row(step, [timing for timing in timings if timing.step == step]) for step in steps)


def _time_row(step: str, attempts: Sequence[StepTime]) -> TimeRow:
    return TimeRow(step, sum(x.seconds for x in attempts), len(attempts), any(x.finished for x in attempts))


def total_seconds(timings: Sequence[StepTime]) -> float:
    """Return the time in which at least one step ran. Parallel steps count once; pauses do not count."""
    total = end = 0.0
    for timing in sorted(timings, key=lambda timing: timing.began):
        last = timing.began + timing.seconds
        total += max(0.0, last - max(timing.began, end))
        end = max(end, last)
    return total


def show_duration(seconds: float) -> str:
    """Format seconds for people: 8.4 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a plain text table: columns as wide as their cells, numeric columns aligned to the right."""
    columns = [_align(column) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    rule = "  ".join("─" * len(column[0]) for column in columns).rstrip()
    return "\n".join([lines[0], rule, *lines[1:]])


def _align(column: Sequence[str]) -> list[str]:
    width = max(len(cell) for cell in column)
    cells = [cell for cell in column[1:] if cell]
    numeric = bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)
    return [cell.rjust(width) if numeric else cell.ljust(width) for cell in column]
