"""Everything that one GPU can tell in six minutes: whether it runs, whether it is right, and how fast it is.

    python benchmarks/gpu.py [--json FILE] [--parts NAME ..] [--minutes 6] [--small] [--log FILE]

Each part is a process of its own with a time limit, so one that fails or hangs costs the others nothing; the rows that
it had by then are kept. Checks of equality run side by side, then parts that are timed run alone, in order of
importance. Those that no time is left for are named. ``--small`` runs the same parts at tiny sizes, on a CPU as well,
which shows that they work and nothing else.

It needs torch, megatron-core, numpy and PyYAML, and psutil for checkpoints. Transformer Engine is used where it is
installed; a part whose name ends in a backend uses that one, and one that ends in ``fp8`` computes in FP8 where that is
possible. What the rows say: ``docs/results/gpu.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_parts.report import as_table, read_rows
from measure import Row, write_rows

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 12


@dataclass(frozen=True)
class Part:
    """A process, and how many seconds it may take."""

    name: str
    limit: float
    says: str
    timed: bool = False
    """Whether its seconds are a result, so nothing else may run."""


PARTS = (
    Part("machine", 40, "what this is"),
    Part("runs", 120, "a step in one process over NCCL, beside the CPU's"),
    Part("parity", 120, "bf16 and Transformer Engine beside fp32, forward and gradients"),
    Part("layouts", 120, "two ranks on one device: tensor, sequence, pipeline, virtual, data"),
    Part("resume", 120, "resumes, checkpoints across backends, deterministic mode, AdamW"),
    Part("tiny", 120, "the tiny model through its four stages, and an answer"),
    Part("stage2", 80, "stage 2 at full width: time, rate, memory, kernels", timed=True),
    Part("stage1", 90, "stage 1 at full size", timed=True),
    Part("text", 60, "text alone", timed=True),
    Part("stage3", 60, "stage 3 at full width", timed=True),
    Part("stage2-local", 60, "stage 2 without Transformer Engine", timed=True),
    Part("stage2-fp8", 80, "stage 2 with the language model in FP8", timed=True),
    Part("products", 40, "ceilings of matrix products at our shapes", timed=True),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    rows: list[Row]
    seconds: float
    failure: str = ""
    output: str = ""


def main() -> int:
    """The command; exit status 1 if a part did not end well."""
    options = _parse()
    deadline = time.monotonic() + 60.0 * options.minutes
    outcomes: list[Outcome] = []
    chosen = [part for part in PARTS if part.name in options.parts]
    if options.small:  # on a CPU that may be busy, so the parts have the time of all of them
        chosen = [replace(part, limit=60.0 * options.minutes) for part in chosen]
    for parts in in_turn(chosen):
        for outcome in run_side_by_side(parts, deadline, small=options.small):
            outcomes.append(outcome)
            print(_ending(outcome), flush=True)
            _write(outcomes, options)
    print("\n".join(["", *summary(outcomes, all_rows(outcomes))]))
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def in_turn(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that may run together: first the machine, then all checks, then each timed part alone."""
    checks = [part for part in parts if not part.timed and part.name != PARTS[0].name]
    alone = [[part] for part in parts if part.timed]
    first = [part for part in parts if part.name == PARTS[0].name]
    return [group for group in (first, checks, *alone) if group]


def run_side_by_side(parts: Sequence[Part], deadline: float, *, small: bool) -> Iterator[Outcome]:
    """Run parts at the same time, and yield their outcomes in the order of the parts."""
    with ExitStack() as stack:
        running = [stack.enter_context(started(part, small=small)) for part in parts]
        for each in running:
            yield each.wait(deadline)


def all_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """What the parts have measured, the parts themselves, and what is compared across parts."""
    return [row for outcome in outcomes for row in [*outcome.rows, _row_of(outcome)]] + compared(outcomes)


def _write(outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    """Write what there is so far: the machine may be taken away before the last part."""
    if options.log:
        texts = [f"==== {outcome.part.name}\n{outcome.output}\n" for outcome in outcomes]
        options.log.write_text("".join(texts), encoding="utf-8")
    if options.json:
        write_rows(options.json, all_rows(outcomes))


@dataclass(frozen=True)
class Running:
    """A part whose process runs in a session of its own."""

    part: Part
    process: subprocess.Popen[bytes]
    folder: Path
    began: float

    def wait(self, deadline: float) -> Outcome:
        """Wait for its end, its own limit or the deadline, and end all of its session."""
        seconds = min(self.part.limit, deadline - self.began)
        if seconds < 2.0:
            return Outcome(self.part, [], 0.0, "no time was left for it")
        failure = ""
        try:
            status = self.process.wait(timeout=max(0.0, self.began + seconds - time.monotonic()))
            failure = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failure = f"it took longer than {seconds:.0f} s"
        end(self.process)
        output = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        return Outcome(self.part, read_rows(self.folder / "rows.json"), time.monotonic() - self.began, failure, output)


@contextmanager
def started(part: Part, *, small: bool, command: Sequence[str] = ()) -> Iterator[Running]:
    """Start a part; nothing of it is left afterwards, also after Ctrl-C."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = list(command) or [sys.executable, "-m", "gpu_parts.part"]
        argv += [part.name, "--rows", str(folder / "rows.json"), *(["--small"] if small else [])]
        with (folder / "log").open("wb") as stream:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=_environment(), stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            yield Running(part, process, folder, time.monotonic())
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its whole session."""
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    """This checkout and the parts can be imported; launchers of this process are none of theirs."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launchers}
    places = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}


def _row_of(outcome: Outcome) -> Row:
    """The part itself: seconds beside its limit."""
    met = not outcome.failure
    name = f"part {outcome.part.name}: seconds" + (f" ({outcome.failure})" if outcome.failure else "")
    return Row(name, outcome.seconds, outcome.part.limit, outcome.seconds / outcome.part.limit, 1.0, met)


def compared(outcomes: Sequence[Outcome]) -> list[Row]:
    """Utilization of each stage beside that of text alone."""
    found = {outcome.part.name: _utilization(outcome.rows) for outcome in outcomes}
    text = found.get("text")
    if not text:
        return []
    goals = {"stage1": None, "stage2": 1.0 / 0.95, "stage3": 1.0 / 0.95}
    return [
        _beside(f"{name}: MFU beside text alone", found[name], text, goal)
        for name, goal in goals.items()
        if found.get(name)
    ]


def _utilization(rows: Sequence[Row]) -> float:
    """The best of all sizes of a micro-batch."""
    return max((row.ours for row in rows if ": MFU" in row.name), default=0.0)


def _beside(name: str, ours: float, text: float, goal: float | None) -> Row:
    ratio = text / ours
    return Row(name, ours, text, ratio, goal, None if goal is None else ratio <= goal)


def summary(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> list[str]:
    """How the parts ended, and the goals that were missed."""
    failed = [outcome.part.name for outcome in outcomes if outcome.failure]
    missed = [row for row in rows if row.met is False]
    goals = sum(row.goal is not None for row in rows)
    head = (
        f"{len(outcomes) - len(failed)} of {len(outcomes)} parts ended well, {goals - len(missed)} of {goals} goals met"
    )
    return [head, *([f"failed: {', '.join(failed)}"] if failed else []), *(as_table(missed) if missed else [])]


def _ending(outcome: Outcome) -> str:
    """Lines for people, when a part has ended."""
    head = f"== {outcome.part.name}: {outcome.part.says}"
    lines = outcome.output.strip().splitlines()
    if outcome.failure:
        return "\n".join([f"{head}: FAILED, {outcome.failure}", *lines[-LAST_LINES:], *as_table(outcome.rows)])
    if not outcome.rows:
        return "\n".join([head, *lines])
    return "\n".join([f"{head}: {outcome.seconds:.0f} s", *as_table(outcome.rows)])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="what is run; all by default")
    parser.add_argument("--minutes", type=float, default=6.0, help="time of all parts together")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU as well")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each row")
    parser.add_argument("--log", type=Path, help="write what the parts printed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
