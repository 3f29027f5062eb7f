"""Format the figures of a data set as tables for the terminal, without the libraries of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_vl.inspector.overview import Overview
from megatron_vl.inspector.text import printable
from megatron_vl.report.tables import format_table

_MAX_EXAMPLE = 160
QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}


def format_summary(overview: Overview) -> str:
    """Return totals, spread, the rows by source and task, and the fate of all records by source and reason."""
    spread = format_table(("of a row or segment", *QUANTILES), _spread(overview))
    if overview.is_sampled:
        spread += f"\n(of {overview.num_scanned:,} rows, evenly spaced)"
    tables = (
        format_table((printable(overview.prefix), ""), _totals(overview)),
        spread,
        format_table(("source", "task", "samples", "tokens", "images", "of tokens"), _kept(overview)),
        format_table(("source", "read", "kept", "left out", "for", "the first of them"), _left_out(overview)),
    )
    return "\n\n".join(tables)


def _totals(overview: Overview) -> list[tuple[str, str]]:
    manifest = overview.manifest
    counts = {
        "rows": manifest.num_rows,
        "samples": manifest.num_samples,
        "segments": manifest.num_segments,
        "tokens": manifest.num_tokens,
        "images": manifest.num_images,
        "images stored": manifest.num_stored_images,
        "tokens in a row at most": manifest.seq_length,
        "slots of an image": manifest.num_queries,
    }
    return [
        *((name, f"{count:,}") for name, count in counts.items()),
        ("samples in a row", f"{manifest.samples_per_row:.2f}"),
        ("images in a row", f"{manifest.num_images / max(manifest.num_rows, 1):.2f}"),
        ("fill", f"{100 * manifest.fill:.1f} %"),
    ]


def _spread(overview: Overview) -> list[tuple[str, ...]]:
    images = np.repeat(np.arange(len(overview.manifest.images_per_row)), overview.manifest.images_per_row)
    return [
        ("tokens in a segment", *_quantiles(overview.segment_lengths, "{:,.0f}")),
        ("tokens in a row", *_quantiles(overview.row_lengths, "{:,.0f}")),
        ("images in a row", *_quantiles(images, "{:,.0f}")),
        ("fill of a row", *_quantiles(100 * overview.fills, "{:.1f} %")),
    ]


def _quantiles(values: npt.NDArray[np.int64] | npt.NDArray[np.float64], form: str) -> Sequence[str]:
    if not len(values):
        return ["–"] * len(QUANTILES)
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return [form.format(value) for value in found.tolist()]


def _kept(overview: Overview) -> list[tuple[str, ...]]:
    return [
        (
            printable(entry.source),
            printable(entry.task),
            *(f"{count:,}" for count in (entry.samples, entry.tokens, entry.images)),
            f"{100 * share:.1f} %",
        )
        for entry, share in overview.kept
    ]


def _left_out(overview: Overview) -> list[tuple[str, ...]]:
    """Return a line for each source, then one for each reason for which it lost records."""
    lines: list[tuple[str, ...]] = []
    for totals in overview.manifest.sources:
        counts = (f"{count:,}" for count in (totals.read, totals.kept, totals.read - totals.kept))
        lines.append((printable(totals.source), *counts, "", ""))
        for skip in overview.skips_of(totals.source):
            first = _cut(printable(next(iter(skip.examples), "")))
            lines.append(("", "", "", f"{skip.count:,}", printable(skip.reason), first))
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_EXAMPLE else f"{text[: _MAX_EXAMPLE - 1]}…"
