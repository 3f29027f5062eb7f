"""Run the steps that ``examples/quickstart.sh`` writes to standard input, then report.

Each word of a step ends with a zero byte (``steps.py``).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_vl import folder_lock
from megatron_vl.cli.command import exit_status
from megatron_vl.cli.parser import CommandParser
from megatron_vl.cli.quickstart.ledger import Ledger
from megatron_vl.cli.quickstart.run_info import TITLES, write_checks, write_run_info
from megatron_vl.cli.quickstart.runner import Runner
from megatron_vl.cli.quickstart.steps import Step, read_steps
from megatron_vl.errors import ConfigError, FolderInUseError
from megatron_vl.files import write_whole
from megatron_vl.log import write_line
from megatron_vl.report.records import StepTime


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if a step failed; 130 or 143 after a signal."""
    leave_on_terminate()
    again = "interrupted: the same command goes on where it stopped"
    return exit_status(lambda: _run(_build_parser().parse_args(argv)), if_interrupted=again)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m megatron_vl.cli.quickstart", __doc__, example="bash examples/quickstart.sh --smoke"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="for example runs/quickstart")
    parser.add_argument("--profile", choices=sorted(TITLES), default="quickstart", help="title and requirements")
    parser.add_argument("--results", type=Path, metavar="DIR", help="also write the results as JSON and Markdown")
    parser.add_argument("--started-as", default="", help="the command for the report")
    parser.add_argument("--setup-seconds", type=float, default=0.0, metavar="S", help="time of the set-up")
    return parser


def _run(options: argparse.Namespace) -> None:
    run_dir: Path = options.run_dir
    words = sys.stdin.read().split("\0")
    try:
        with folder_lock.hold(run_dir, ".lock"):
            _run_steps(run_dir, read_steps(words), options)
    except FolderInUseError as error:
        text = f"{run_dir}: another quickstart runs here ({error}); wait for it, or choose another --output"
        raise ConfigError(text) from error


def _run_steps(run_dir: Path, steps: Sequence[Step], options: argparse.Namespace) -> None:
    write_run_info(run_dir, options.profile, options.started_as)
    ledger = Ledger(run_dir)
    if options.setup_seconds >= 1 or not any(timing.step == "set-up" for timing in ledger.times()):
        began = time.time() - options.setup_seconds
        ledger.add_time(StepTime("set-up", options.setup_seconds, began))
    write_line(f"{TITLES[options.profile]}, in {run_dir}. Every command runs with OMP_NUM_THREADS=1.")
    Runner(ledger, Path.cwd(), write_line).run(steps)
    _report(run_dir, options.profile, options.results)


def _report(run_dir: Path, profile: str, results: Path | None) -> None:
    from megatron_vl.report.report import read_report, render_page, render_text
    from megatron_vl.report.results import write_results

    write_checks(run_dir)
    report = read_report(run_dir)
    write_whole(run_dir / "report.html", render_page(report, run_dir))
    write_line()
    write_line(render_text(report))
    if results is not None:
        write_results(report, results / profile)
        write_line(f"Results: {results / profile}.json and .md")
    write_line(f"Report: {run_dir / 'report.html'}")
    write_line(f"Hugging Face folder: {run_dir / 'hf' / 'stage3'}")


def leave_on_terminate() -> None:
    """Make SIGTERM end the program as an error does: stop the running command, and record its time."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
