"""The report of a rehearsal, in lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from megatron_vl.planning.layout import vision_part
from megatron_vl.rehearsal.places import Grid
from megatron_vl.rehearsal.records import Operation, Rehearsed
from megatron_vl.rehearsal.step import Step

_GB, _MB = 1e9, 1e6
_SHOWN = 24
"""Messages of the order that are shown."""


def describe(reports: Sequence[Rehearsed], steps: Mapping[int, Step], grid: Grid) -> list[str]:
    """Return what each rehearsed rank holds, sends and waits for.

    Args:
        steps: the micro-batches of each data-parallel rank that is rehearsed.
    """
    lines = [
        *_held(reports, steps),
        "",
        *_exchanged(reports, grid),
        "",
        "messages between stages in their order (>1: sent to pipeline rank 1, <0: received from 0)",
    ]
    return lines + [f"{_name(one)}   {_order(one, steps[one.place.data], grid)}" for one in reports]


def _name(one: Rehearsed) -> str:
    place = one.place
    return f"{one.rank:6}   {place.pipeline:8}   {place.tensor:6}   {place.data:4}"


_HEAD = "  rank   pipeline   tensor   data"


def _held(reports: Sequence[Rehearsed], steps: Mapping[int, Step]) -> Iterator[str]:
    yield f"{_HEAD}          trained           frozen   weights   gradients   optimizer (GB)   stages"
    for one in reports:
        held, step = one.held, steps[one.place.data]
        stages = [*step.layout.stages_of_rank(one.place.pipeline)]
        if step.config.parallel.vision_parallel == "data":
            stages.append(vision_part(step.config.model))
        yield (
            f"{_name(one)}   {held.trained:14,}   {held.frozen:14,}   {held.weight_bytes / _GB:7.2f}   "
            f"{held.gradient_bytes / _GB:9.2f}   {held.optimizer_bytes / _GB:14.2f}   {'; '.join(map(str, stages))}"
        )


def _exchanged(reports: Sequence[Rehearsed], grid: Grid) -> Iterator[str]:
    yield f"{_HEAD}   with                                what             calls           MB"
    shown: dict[tuple[str, ...], int] = {}
    for one in reports:
        rows = tuple(_totals(one, grid))
        if rows in shown:
            yield f"{_name(one)}   as rank {shown[rows]}"
            continue
        shown[rows] = one.rank
        yield from (f"{_name(one)}   {row}" for row in rows)


def _totals(one: Rehearsed, grid: Grid) -> Iterator[str]:
    """Yield what a rank exchanges in the step, added up by partner and kind."""
    totals: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for step in one.program[one.start :]:
        if isinstance(step, Operation) and len(one.groups[step.group]) > 1:
            totals[_partner(one, step, grid), step.kind].append(step)
    for (partner, kind), steps in totals.items():
        size = sum(step.num_bytes for step in steps) / _MB
        yield f"{partner:33}   {kind:14}   {len(steps):5}   {size:10,.2f}"


def _partner(one: Rehearsed, step: Operation, grid: Grid) -> str:
    """Return with whom a rank exchanges: another rank of its replica, or a group by what its members have in common."""
    if step.kind in ("send", "receive"):
        assert step.peer is not None
        other, own = grid.place(step.peer), one.place
        tensor = f", tensor {other.tensor}" if other.tensor != own.tensor else ""
        return f"pipeline rank {other.pipeline}{tensor}"
    ranks = one.groups[step.group]
    if len(ranks) == grid.world_size:
        return f"all {len(ranks)} ranks"
    places = [grid.place(rank) for rank in ranks]
    varies = [name for name in ("tensor", "data", "pipeline") if len({getattr(place, name) for place in places}) > 1]
    return f"{' x '.join(varies)} group of {len(ranks)}"


def _order(one: Rehearsed, step: Step, grid: Grid) -> str:
    words = []
    for message in step.stage_messages(one.program):
        assert message.peer is not None
        words.append(f"{'>' if message.kind == 'send' else '<'}{grid.place(message.peer).pipeline}")
    shown = [f"{word} x{count}" if count > 1 else word for word, count in _runs(words[:_SHOWN])]
    return " ".join(shown) + (f" ... ({len(words)} in all)" if len(words) > _SHOWN else "") or "none"


def _runs(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    for word, same in groupby(words):
        yield word, len(list(same))
