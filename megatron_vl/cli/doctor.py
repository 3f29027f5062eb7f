"""``tools/doctor.py``: look at a machine, or at all machines of a run, before training.

Prints a line for each thing that is checked: Python and packages, CUDA devices, cores and memory, disk, limits and the
environment. Each line begins with one of

    ok        it is there and works
    missing   something optional is not there; the line says what it would give
    wrong     training would fail or lose much; the line says what to do

A machine without GPU is fine. Under torchrun, Slurm or MPI the ranks also compare versions and clocks, and measure what
goes between them over the backend that a training would use. The exit status is 0 if nothing is wrong, and 2 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.doctor.examine import examine
from megatron_vl.doctor.facts import Facts, Group
from megatron_vl.doctor.findings import Kind, Row, count, format_rows
from megatron_vl.doctor.judge_group import judge
from megatron_vl.doctor.waiting import still_waits
from megatron_vl.errors import ExitStatus, MegatronVLError
from megatron_vl.launch import read_launch
from megatron_vl.log import write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if something is wrong."""
    status = exit_status(lambda: _run(_build_parser().parse_args(argv)))
    if still_waits():
        sys.stdout.flush()
        os._exit(status)
    return status


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("tools/doctor.py", __doc__, example="python tools/doctor.py --path runs --json doctor.json")
    parser.add_argument(
        "--path", type=Path, default=Path(), metavar="DIR", help="a folder that runs will write to (default: .)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines as JSON too")
    parser.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="how long to wait for ranks and imports"
    )
    return parser


def _run(options: argparse.Namespace) -> ExitStatus:
    check_at_least("--timeout", options.timeout, 1)
    launch = read_launch()
    if options.json is not None and launch.rank == 0:
        check_writable(options.json, flag="--json")
    own = examine(launch, options.path, patience_s=options.timeout)
    group = _meet(own, options.timeout)
    if group.error and launch.rank > 0:
        raise MegatronVLError(group.error)  # rank 0 tells of it among its lines, if it is there
    rows = judge(group)
    status = ExitStatus.USER_ERROR if any(row.finding.kind == Kind.WRONG for row in rows) else ExitStatus.DONE
    if launch.rank == 0:
        _show(rows, group, options.json)
    if launch.world_size > 1 and not group.error:
        from megatron_vl.doctor.group import leave

        leave()
    return status


def _meet(own: Facts, timeout_s: float) -> Group:
    """Return what all ranks have found together; or this rank alone, where there are no others or torch is broken.

    Raises:
        MegatronVLError: on ranks other than 0, if torch is broken here.
    """
    if own.launch.world_size == 1:
        return Group((own,))
    torch = own.package("torch")
    if torch.works:
        from megatron_vl.doctor.group import examine_group

        return examine_group(own, timeout_s)
    reason = f"{own.host} cannot meet the others: torch does not work there"
    if own.launch.rank > 0:
        raise MegatronVLError(f"{reason} ({torch.error or 'it is not installed'})")
    return Group((own,), error=reason)


def _show(rows: Sequence[Row], group: Group, file: Path | None) -> None:
    hosts = {facts.host for facts in group.ranks}
    write_line(format_rows(rows, hosts=len(hosts)))
    write_line(f"\n{count(rows)}. {_conclusion(rows, group)}")
    if file is not None:
        write_whole(file, json.dumps([row.as_json() for row in rows], indent=1) + "\n", flag="--json")


def _conclusion(rows: Sequence[Row], group: Group) -> str:
    if any(row.finding.kind == Kind.WRONG for row in rows):
        return "See what the lines that begin with 'wrong' say"
    devices = all(facts.computes_on_cuda for facts in group.ranks)
    ranks = len(group.ranks)
    who = f"{ranks} ranks" if ranks > 1 else "one rank"
    return f"Training works here, with {who} on {'CUDA' if devices else 'the CPU'}"
