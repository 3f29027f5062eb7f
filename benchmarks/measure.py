"""How the benchmarks measure: contenders take turns, and a ratio is formed within each turn.

A machine drifts: its clock, its other users, its caches. Contenders that run one after the other in short turns meet
the same drift, so the ratio of two times of one turn is worth more than the ratio of two averages. What is reported is
the median of those ratios and the range in which the middle half of them lies; both of wall-clock time and of the CPU
time of this process, which other users of the machine disturb less.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles


@dataclass(frozen=True)
class Times:
    """Seconds of each turn of one contender."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """The median, and the quartiles around it."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


@dataclass(frozen=True)
class Row:
    """One comparison, as written to ``--json``."""

    name: str
    ours: float
    reference: float
    ratio: float
    goal: float | None
    """The largest ratio that is good enough; none for what is only reported."""
    met: bool | None


def take_turns(contenders: dict[str, Callable[[], object]], *, turns: int, warm_up: int = 2) -> dict[str, Times]:
    """Run every contender once a turn, in the order given; the first ``warm_up`` turns are not counted."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warm_up + turns):
        for name, run in contenders.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    return {name: Times(tuple(wall[name][warm_up:]), tuple(cpu[name][warm_up:])) for name in contenders}


def ratios(ours: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of ours / reference, turn by turn."""
    return Spread.of([mine / other for mine, other in zip(ours, reference, strict=True)])


def compare(name: str, ours: Times, reference: Times, *, goal: float | None) -> Row:
    """The comparison by wall-clock time."""
    ratio = ratios(ours.wall, reference.wall).middle
    met = None if goal is None else ratio <= goal
    return Row(name, median(ours.wall), median(reference.wall), ratio, goal, met)


def describe_machine() -> str:
    """Processor, cores, load, versions, commit and time: what a figure means nothing without."""
    import torch

    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{_processor()}, {os.cpu_count()} cores, load {load}; Python {platform.python_version()}, "
        f"torch {torch.__version__}; commit {_commit()}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
