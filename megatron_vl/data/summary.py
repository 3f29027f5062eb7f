"""What a preparation kept and left out, as the lines of a table."""

from __future__ import annotations

from megatron_vl.data.manifest import Manifest

_HEAD = ("source", "task / left out for", "records", "in rows", "tokens", "images")


def summary_lines(manifest: Manifest) -> list[str]:
    """A block for each source (what was read, kept and put into rows, what was left out and why), then the rows."""
    lines = [_line(*_HEAD)]
    for totals in manifest.sources:
        lines.append(_line(totals.source, "read", totals.read))
        lines.append(_line("", "kept", totals.kept))
        for count in manifest.counts:
            if count.source == totals.source:
                lines.append(_line("", f"  {count.task}", "", count.samples, count.tokens, count.images))
        for skip in manifest.skips:
            if skip.source == totals.source:
                lines.append(f"{_line('', skip.reason, skip.count)}   {skip.examples[0]:.60}")
    lines.append(
        f"{manifest.num_rows} rows of at most {manifest.seq_length} tokens, {100 * manifest.fill:.1f} % filled; "
        f"{manifest.samples_per_row:.2f} samples and {manifest.num_images / manifest.num_rows:.2f} images a row; "
        f"{manifest.num_stored_images} images stored"
    )
    return lines


def _line(source: str, what: str, *numbers: int | str) -> str:
    cells = [f"{number:,}" if isinstance(number, int) else number for number in numbers]
    return f"{source:<24} {what:<24}" + "".join(f" {cell:>14}" for cell in cells)
