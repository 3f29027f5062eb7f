"""Lay the programs of the ranks side by side: would they meet, and would they ever wait for ever?

The k-th message from one rank to another over a process group is received by the k-th receive there, and the k-th
collective of a group is one for all of its members. Both sides must agree on shape and type. Then the programs run
against each other: a rank goes on until it waits for something that another rank has not come to. Nothing is buffered:
a send is complete when its receive was posted. If all ranks that are left wait, the run would hang.

Ranks that are not rehearsed do as their kind does, so what they take part in needs nobody but those that are here. The
order of messages that are posted together, without a wait between them, is not judged: NCCL groups them.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_vl.rehearsal.records import Operation, Rehearsed, Wait

Meeting = tuple[object, ...]
"""What the operations of several ranks have in common that belong together."""
_SHOWN = 5


@dataclass(frozen=True)
class _Part:
    """The part of one rank in a meeting."""

    rank: int
    operation: Operation


def find_faults(reports: Sequence[Rehearsed]) -> list[str]:
    """Return what would make these ranks hang or fail, in words; nothing if they fit together."""
    here = {report.rank for report in reports}
    meetings: dict[Meeting, list[_Part]] = defaultdict(list)
    programs: dict[int, list[Meeting]] = {}
    for report in reports:
        programs[report.rank] = []
        for meeting, part in _parts(report):
            programs[report.rank].append(meeting)
            if part is not None:
                meetings[meeting].append(part)
    groups = {name: ranks for report in reports for name, ranks in report.groups.items()}
    needed = {meeting: _needed(meeting, groups, here) for meeting in meetings}
    faults = [fault for meeting, parts in meetings.items() for fault in _differences(meeting, parts)]
    faults += _absences(meetings, needed)
    if not faults:
        faults = _Run(programs, meetings, needed, {report.rank: report for report in reports}).stuck()
    shown = faults[:_SHOWN]
    return shown + ([f"... and {len(faults) - _SHOWN} more of this kind"] if len(faults) > _SHOWN else [])


def _parts(report: Rehearsed) -> Iterator[tuple[Meeting, _Part | None]]:
    """Yield the meeting of each step of a program, with the part of the rank where it is an operation."""
    counts: Counter[Meeting] = Counter()
    met: list[Meeting] = []
    for step in report.program:
        if isinstance(step, Wait):
            met.append(met[step.step])
            yield met[-1], None
            continue
        channel: Meeting = (step.group,)
        if step.kind == "send":
            channel = (step.group, report.rank, step.peer)
        elif step.kind == "receive":
            channel = (step.group, step.peer, report.rank)
        met.append((*channel, counts[channel]))
        counts[channel] += 1
        yield met[-1], _Part(report.rank, step)


def _needed(meeting: Meeting, groups: Mapping[str, tuple[int, ...]], here: set[int]) -> set[int]:
    """Return the rehearsed ranks that a meeting needs."""
    ranks = set(meeting[1:3]) if len(meeting) == 4 else set(groups[str(meeting[0])])
    return {rank for rank in here if rank in ranks}


def _differences(meeting: Meeting, parts: Sequence[_Part]) -> Iterator[str]:
    """Yield where two ranks that meet mean different things."""
    first = parts[0]
    for other in parts[1:]:
        if _meant(other.operation) != _meant(first.operation):
            yield (
                f"rank {first.rank} asks for {first.operation}, and rank {other.rank} for {other.operation}, at the "
                f"same place (number {meeting[-1]}) of process group {meeting[0]}"
            )


def _meant(operation: Operation) -> tuple[object, ...]:
    """Return what both sides must agree on."""
    if operation.kind in ("send", "receive"):
        return operation.shapes, operation.dtype
    if operation.dtype == "uint8" and operation.kind == "all-gather":
        return (operation.kind,)  # objects; all ranks use the length of the longest
    return operation.kind, operation.shapes, operation.dtype, operation.peer


def _absences(meetings: Mapping[Meeting, Sequence[_Part]], needed: Mapping[Meeting, set[int]]) -> list[str]:
    """Return who does not come to a meeting, once for each group or pair of ranks."""
    faults: dict[Meeting, str] = {}
    for meeting, parts in meetings.items():
        absent = needed[meeting] - {part.rank for part in parts}
        if absent:
            first = parts[0]
            faults.setdefault(
                meeting[:-1],
                f"rank {first.rank} comes to {first.operation} (number {meeting[-1]} of process group {meeting[0]}), "
                f"and rank {min(absent)} never does",
            )
    return list(faults.values())


@dataclass
class _Run:
    """The programs, run against each other."""

    programs: Mapping[int, Sequence[Meeting]]
    meetings: Mapping[Meeting, Sequence[_Part]]
    needed: Mapping[Meeting, set[int]]
    reports: Mapping[int, Rehearsed]
    _came: Counter[Meeting] = field(default_factory=Counter, init=False)
    _places: dict[int, int] = field(default_factory=dict, init=False)
    _waiting: dict[Meeting, list[int]] = field(default_factory=lambda: defaultdict(list), init=False)

    def stuck(self) -> list[str]:
        """Return who waits for whom when nobody can go on; nothing if all programs end."""
        self._places = dict.fromkeys(self.programs, 0)
        ready = deque(self.programs)
        while ready:
            ready.extend(self._advance(ready.popleft()))
        return [self._describe(rank, place) for rank, place in self._places.items() if place < len(self.programs[rank])]

    def _advance(self, rank: int) -> list[int]:
        """Run one program until it must wait; return the ranks that may go on now."""
        woken: list[int] = []
        program, steps = self.programs[rank], self.reports[rank].program
        for place in range(self._places[rank], len(program)):
            meeting = program[place]
            if isinstance(steps[place], Wait):
                if self._came[meeting] < len(self.needed[meeting]):
                    self._places[rank] = place
                    self._waiting[meeting].append(rank)
                    return woken
                continue
            self._came[meeting] += 1
            if self._came[meeting] == len(self.needed[meeting]):
                woken += self._waiting.pop(meeting, [])
        self._places[rank] = len(program)
        return woken

    def _describe(self, rank: int, place: int) -> str:
        meeting = self.programs[rank][place]
        own = next(part.operation for part in self.meetings[meeting] if part.rank == rank)
        others = [
            part.rank for part in self.meetings[meeting] if part.rank != rank and not self._has_come(part.rank, meeting)
        ]
        return (
            f"rank {rank} ({self.reports[rank].place}) waits for its {own}, number {meeting[-1]} of process group "
            f"{meeting[0]}, to which rank {', '.join(map(str, others))} has not come: it waits itself"
        )

    def _has_come(self, rank: int, meeting: Meeting) -> bool:
        return meeting in self.programs[rank][: self._places[rank]]
