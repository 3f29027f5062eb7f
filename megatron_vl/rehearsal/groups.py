"""Compare what the members of each process group believe.

A rank makes all groups of the run, in order, and is a member of some. torch names a group by its number in that order;
members that disagree on the number or on the ranks would wait for each other for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_vl.rehearsal.places import Grid
from megatron_vl.rehearsal.records import Membership


def group_faults(grid: Grid, everyone: Iterable[Membership]) -> list[str]:
    """Return where ranks disagree about places and groups."""
    faults, members = [], defaultdict(list)
    for one in everyone:
        expected = grid.place(one.rank)
        if one.place != expected:
            faults.append(f"rank {one.rank} believes to be {one.place}, and is {expected}")
        for name, ranks in one.groups.items():
            members[name].append((one.rank, ranks))
    for name, believed in members.items():
        first, ranks = believed[0]
        faults += [
            f"process group {name}: rank {first} makes it of {_few(ranks)}, and rank {other} of {_few(others)}"
            for other, others in believed[1:]
            if others != ranks
        ]
        here = {rank for rank, _ in believed}
        if here != set(ranks):
            missing = sorted(set(ranks) - here) or sorted(here - set(ranks))
            faults.append(f"process group {name} of {_few(ranks)}: not of the same mind is {_few(missing)}")
    return faults


def _few(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:6]))
    return f"ranks {shown}" + (f", ... ({len(ranks)} in all)" if len(ranks) > 6 else "")
