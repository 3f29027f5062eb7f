"""Checks of the outcome of reading, before anything is written. A source without samples is probably a mistake.

A wrong field name, a folder of the wrong layout or a filter that rejects everything leaves a source without samples.
The trained model does not show this. So it is an error, unless the recipe or ``--allow-empty`` permits it. The finished
parts are kept, so the next run reads again only what was corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.data.prepare.gather import SourceCounts
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.errors import DataError


def check_outcome(recipe: DataRecipe, all_counts: Sequence[SourceCounts]) -> None:
    """Raise DataError if a source has no samples left, or none of its samples has the requested score."""
    named = [(entry.source.name, counts) for entry, counts in zip(recipe.sources, all_counts, strict=True)]
    empty = [(name, counts) for name, counts in named if not counts.kept]
    if len(empty) == len(named) or (empty and not recipe.allow_empty):
        what = f"nothing is kept of source {', '.join(repr(name) for name, _ in empty)}"
        what += ". Mend or remove what is meant to give something, or go on without it (--allow-empty)"
        losses = "".join(f"\n  {line}" for name, counts in empty for line in _losses(name, counts))
        raise DataError(f"{'no sample is left to write' if len(empty) == len(named) else what}:{losses}")
    for entry, counts in zip(recipe.sources, all_counts, strict=True):
        if entry.needs_scores and counts.kept and not counts.num_scored:
            fields = " or ".join(map(repr, entry.source.score_fields()))
            raise DataError(
                f"source {entry.source.name!r}: none of the {counts.read:,} records has a score in {fields}, but one "
                "is asked for. Name the field that holds it (score_field), or remove score_field and min_score "
                "(of one source: filters: {min_score: null})"
            )


def check_drawn(all_counts: Sequence[SourceCounts], drawn: int) -> None:
    """Raise DataError if samples are kept, but weights and amounts select none of them."""
    if not drawn:
        kept = sum(counts.kept for counts in all_counts)
        raise DataError(
            f"no sample is left to write: of {kept:,} that were kept, none is drawn. Raise weight, samples or "
            "mixture.max_repeats: a weight of 0.1 takes every tenth sample"
        )


def _losses(name: str, counts: SourceCounts) -> list[str]:
    """Return a line for each reason for which a source lost samples, with the first example."""
    lines = [
        f"source {name!r}: {count:,} of {counts.read:,} left out for {reason}, first {counts.examples[reason][0]}"
        for reason, count in counts.skips.items()
    ]
    return lines or [f"source {name!r}: it is empty"]
