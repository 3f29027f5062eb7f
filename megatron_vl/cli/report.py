"""``tools/make_report.py RUN_DIR``: write a run's ``report.html`` and print its tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.cli.command import exit_status
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.log import write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("tools/make_report.py", __doc__, example="python tools/make_report.py runs/quickstart")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="for example runs/quickstart")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    return parser


def _run(options: argparse.Namespace) -> None:
    from megatron_vl.report.report import read_report, render_page, render_text

    path = options.output or options.run_dir / "report.html"
    if options.run_dir.is_dir():  # otherwise a mistyped name would create a folder
        check_writable(path)
    report = read_report(options.run_dir)
    write_whole(path, render_page(report, path.parent))
    write_line(render_text(report))
    write_line(f"Report: {path}")
