"""A training stage cut where its parallel layout changes: what plots and tables have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.evaluation.records import TrainingRecord


@dataclass(frozen=True)
class Leg:
    """A stretch of steps at one layout."""

    layout: str
    first: int
    last: int


def find_legs(records: Sequence[TrainingRecord]) -> tuple[Leg, ...]:
    """Cut a stage into stretches of steps at one layout, in order; a record speaks for the steps since the last."""
    legs: list[Leg] = []
    for record in records:
        if legs and legs[-1].layout == record.layout:
            legs[-1] = Leg(record.layout, legs[-1].first, record.iteration)
        else:
            legs.append(Leg(record.layout, legs[-1].last + 1 if legs else 1, record.iteration))
    return tuple(legs)
