"""Table of what a preparation kept and left out."""

from __future__ import annotations

from megatron_vl.data.dataset.manifest import Manifest

_LONGEST = 300
"""Greatest number of characters of an example. Its path should be complete."""
_HEAD = ("source", "task / left out for", "records", "in rows", "tokens", "images")


def summary_lines(manifest: Manifest) -> list[str]:
    """Return a block for each source (read, kept, in rows, left out with reasons), then the figures of the rows."""
    lines = [_line(*_HEAD)]
    for totals in manifest.sources:
        lines.append(_line(totals.source, "read", totals.read))
        lines.append(_line("", "kept", totals.kept))
        for count in manifest.counts:
            if count.source == totals.source:
                lines.append(_line("", f"  {count.task}", "", count.samples, count.tokens, count.images))
        for skip in manifest.skips:
            if skip.source == totals.source:
                lines.append(_line("", skip.reason, skip.count))
                lines.append(f"{'':<27}{_example(skip.examples[0])}")
    if manifest.amounts_factor < 1:
        factor, scarcest = manifest.amounts_factor, manifest.scarcest_group
        lines.append(f"all amounts x {factor:.3g}, for {scarcest!r} has too few samples for its own")
    lines.append(
        f"{manifest.num_rows} rows of at most {manifest.seq_length} tokens, {100 * manifest.fill:.1f} % filled; "
        f"{manifest.samples_per_row:.2f} samples and {manifest.num_images / manifest.num_rows:.2f} images a row; "
        f"{manifest.num_stored_images} images stored"
    )
    return lines


def warning_lines(manifest: Manifest) -> list[str]:
    """Return a warning for each source that contributed no samples; this is probably a mistake."""
    lines = []
    for totals in manifest.sources:
        if not totals.kept:
            skips = [skip for skip in manifest.skips if skip.source == totals.source]
            lost = ", ".join(f"{skip.count:,} left out for {skip.reason}" for skip in skips)
            lines.append(f"nothing of source {totals.source!r} is in the rows: {lost or 'it is empty'}")
    return lines


def _example(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _line(source: str, what: str, *numbers: int | str) -> str:
    cells = [f"{number:,}" if isinstance(number, int) else number for number in numbers]
    return f"{source:<24} {what:<24}" + "".join(f" {cell:>14}" for cell in cells)
