"""What follows from the facts, a line for each thing that was checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

_HOSTS_NAMED = 8


class Kind(IntEnum):
    """Whether training can use what was looked for; the larger, the worse."""

    OK = 0
    MISSING = 1
    """Something optional is not there."""
    WRONG = 2
    """Training would fail, or silently lose much."""


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    name: str
    kind: Kind
    found: str
    advice: str = ""
    """What a missing thing would give, or what to do about a wrong one."""


@dataclass(frozen=True)
class Row:
    """A finding, and the machines that have it."""

    finding: Finding
    hosts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return asdict(self.finding) | {"kind": self.finding.kind.name.lower(), "hosts": list(self.hosts)}


def ok(name: str, found: str) -> Finding:
    """Return a finding of something that works."""
    return Finding(name, Kind.OK, found)


def missing(name: str, found: str, gives: str) -> Finding:
    """Return a finding of something optional that is not there."""
    return Finding(name, Kind.MISSING, found, gives)


def wrong(name: str, found: str, advice: str) -> Finding:
    """Return a finding of something with which training would fail or lose much."""
    return Finding(name, Kind.WRONG, found, advice)


def join(by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Row]:
    """Join the findings of all ranks: those of rank 0, each followed by what is worse or otherwise wrong elsewhere.

    Ranks on one machine, and machines, often have the same finding with other numbers. So of each kind only the first
    one is told, with the machines that have the kind.
    """
    rows: list[Row] = []
    names = dict.fromkeys(finding.name for findings in by_rank for finding in findings)
    for name in names:
        kinds: dict[Kind, list[str]] = {}
        first: dict[Kind, Finding] = {}
        for findings, host in zip(by_rank, hosts, strict=True):
            for finding in findings:
                if finding.name == name:
                    kinds.setdefault(finding.kind, []).append(host)
                    first.setdefault(finding.kind, finding)
        of_rank_0 = next((finding.kind for finding in by_rank[0] if finding.name == name), None)
        told = [kind for kind in kinds if kind == of_rank_0 or kind > Kind.OK]
        rows += [Row(first[kind], tuple(dict.fromkeys(kinds[kind]))) for kind in told]
    return rows


def format_rows(rows: Sequence[Row], *, hosts: int) -> str:
    """Return the rows as aligned lines; where there are several machines, those of a bad one are named."""
    width = max(len(row.finding.name) for row in rows)
    return "\n".join(_format(row, width, several=hosts > 1) for row in rows)


def _format(row: Row, width: int, *, several: bool) -> str:
    finding = row.finding
    where = f" [{_named(row.hosts)}]" if several and finding.kind > Kind.OK else ""
    advice = f": {finding.advice}" if finding.advice else ""
    return f"{finding.kind.name.lower():8} {finding.name:{width}}  {finding.found}{advice}{where}"


def _named(hosts: Sequence[str]) -> str:
    more = len(hosts) - _HOSTS_NAMED
    return ", ".join(hosts[:_HOSTS_NAMED]) + (f" and {more} more" if more > 0 else "")


def count(rows: Sequence[Row]) -> str:
    """Return the number of rows of each kind in words."""
    counts = Counter(row.finding.kind for row in rows)
    return ", ".join(f"{counts[kind]} {kind.name.lower()}" for kind in Kind)
