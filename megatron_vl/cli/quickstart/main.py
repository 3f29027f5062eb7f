"""``examples/quickstart.sh``: run the plan, then report."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_vl.cli.output import write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.cli.quickstart.findings import gather_findings, write_run_info
from megatron_vl.cli.quickstart.ledger import Ledger
from megatron_vl.cli.quickstart.plan import STAGES, Plan
from megatron_vl.cli.quickstart.profiles import PROFILES
from megatron_vl.cli.quickstart.runner import Runner
from megatron_vl.errors import MegatronVLError
from megatron_vl.log import escape_what_terminals_cannot_show, write_line
from megatron_vl.report.records import StepTime

EXIT_FAILED = 1
ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 if a step failed."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _build_parser().parse_args(arguments)
    leave_on_terminate()
    escape_what_terminals_cannot_show()
    try:
        _run(options)
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return EXIT_FAILED
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "examples/quickstart.sh",
        "From raw data to a scored tiny Qwen-VL on two cores, and a report. Started again, it goes on where it stopped "
        "and reuses what is there.",
        example="bash examples/quickstart.sh --smoke",
    )
    parser.add_argument("--smoke", action="store_true", help="three minutes: everything runs, nothing is learned")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run directory (default: runs/PROFILE)")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quickstart", help="how much is done")
    parser.add_argument("--results", type=Path, metavar="DIR", help="also write the results as JSON and Markdown")
    parser.add_argument("--setup-seconds", type=float, default=0.0, metavar="S", help=argparse.SUPPRESS)
    parser.add_argument("--started-as", default="", help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> None:
    profile = PROFILES["smoke" if options.smoke else options.profile]
    run_dir = (options.output or ROOT / "runs" / profile.name).resolve()
    results = options.results.resolve() if options.results else None
    # Commands are shown as a user would type them in the checkout.
    os.chdir(ROOT)
    plan = Plan(profile, run_dir.relative_to(ROOT) if run_dir.is_relative_to(ROOT) else run_dir, ROOT)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    write_run_info(plan, options.started_as or shlex.join(["python", "-m", "megatron_vl.cli.quickstart"]))
    ledger = Ledger(plan.run_dir)
    if options.setup_seconds >= 1 or not any(timing.step == "set-up" for timing in ledger.times()):
        began = time.time() - options.setup_seconds
        ledger.add_time(StepTime("set-up", options.setup_seconds, began))
    write_line(f"{profile.title}, in {plan.run_dir}. Every command runs with OMP_NUM_THREADS=1.")
    runner = Runner(ledger, ROOT, write_line)
    for group in plan.groups():
        runner.run_group(group)
    _report(plan, results)


def _report(plan: Plan, results: Path | None) -> None:
    from megatron_vl.report.report import read_report, render_page, render_text
    from megatron_vl.report.results import write_results

    gather_findings(plan)
    report = read_report(plan.run_dir)
    write_whole(plan.run_dir / "report.html", render_page(report, plan.run_dir))
    write_line()
    write_line(render_text(report))
    if results is not None:
        write_results(report, results / plan.profile.name)
        write_line(f"Results: {results / plan.profile.name}.json and .md")
    write_line(f"Report: {plan.run_dir / 'report.html'}")
    write_line(f"Hugging Face folder: {plan.exported(STAGES[3])}")


def leave_on_terminate() -> None:
    """Make SIGTERM end the program as an error does: stop the running command, and record its time."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
