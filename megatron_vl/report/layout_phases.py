"""Split a training stage where its parallel layout changes; used by plots and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.report.records import TrainingRecord


@dataclass(frozen=True)
class LayoutPhase:
    """Consecutive steps at one layout."""

    layout: str
    first: int
    last: int


def find_layout_phases(records: Sequence[TrainingRecord]) -> tuple[LayoutPhase, ...]:
    """Split a stage into phases of one layout each, in order; a record stands for the steps since the previous one."""
    phases: list[LayoutPhase] = []
    for record in records:
        if phases and phases[-1].layout == record.layout:
            phases[-1] = LayoutPhase(record.layout, phases[-1].first, record.iteration)
        else:
            phases.append(LayoutPhase(record.layout, phases[-1].last + 1 if phases else 1, record.iteration))
    return tuple(phases)
