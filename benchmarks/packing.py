"""The packer beside first-fit decreasing and next-fit: rows, fill, and seconds.

    python benchmarks/packing.py [--samples 1000000 3000000 10000000] [--turns 5] [--json FILE] [--smoke]

What is timed is ``pack`` of ``megatron_vl/data/prepare/packing.py`` with everything that it returns: the row and the
place of every sample and of every piece of a text document. The references only count their rows, and keep text
documents whole. Before anything is timed, the packing of the largest stream is checked: every sample once, every
token of a document once, no row above its limits. All run on one core; next to wall-clock time stands the CPU time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from measure import Row, Spread, Times, compare, describe_machine, take_turns, write_rows
from stream import ROW, check_stream, fill, first_fit_decreasing, make_stream, next_fit

from megatron_vl.data.dataset.rows import MAX_IMAGES_PER_ROW
from megatron_vl.data.prepare.packing import Items, Packing, PackLimits, pack, pack_by_group

LIMITS = PackLimits(ROW, MAX_IMAGES_PER_ROW)
MAX_SECONDS = 5.0
MIN_FILL = 0.98
MAX_GROWTH = 1.25
"""Of the time of a sample, from the smallest stream to the largest; sorting alone gives 1.17 from 1 to 10 million."""


def main() -> None:
    """Pack the streams, compare rows and times, and print a line for each comparison."""
    options = _parse()
    print(describe_machine())
    print(check_stream())
    streams = {count: make_stream(count) for count in sorted(options.samples)}
    largest = streams[max(streams)]
    rows = _compare_rows(largest)
    contenders: dict[str, Callable[[], object]] = {str(count): _Packer(items) for count, items in streams.items()}
    contenders["first-fit decreasing"] = lambda: first_fit_decreasing(largest.lengths)
    times = take_turns(contenders, turns=options.turns, warm_up=1)
    rows += _compare_times(times, sorted(streams))
    if options.json:
        write_rows(options.json, rows)


class _Packer:
    """Packs one stream."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __call__(self) -> Packing:
        return pack(self._items, limits=LIMITS, seed=0)


def check_packing(packing: Packing, items: Items) -> None:
    """Every sample that is no text once and whole, every token of a document once, no row above its limits.

    Raises:
        SystemExit: it is not so.
    """
    sizes, begins = packing.stops - packing.starts, packing.row_splits[:-1]
    whole = ~items.is_text[packing.samples]
    seen = np.bincount(packing.samples[whole], minlength=len(items))
    covered = np.bincount(packing.samples, weights=sizes, minlength=len(items))
    order = np.lexsort((packing.starts[~whole], packing.samples[~whole]))
    text, starts, stops = (column[~whole][order] for column in (packing.samples, packing.starts, packing.stops))
    joined = np.where(np.diff(text, prepend=-1) != 0, 0, np.concatenate([[0], stops[:-1]]))
    right = {
        "a sample that is no text lies in one row": np.array_equal(seen, ~items.is_text),
        "every token lies in a row": np.array_equal(covered, items.lengths),
        "pieces of a document follow each other": np.array_equal(starts, joined),
        "rows keep to their tokens": np.add.reduceat(sizes, begins).max() <= LIMITS.tokens,
        "rows keep to their images": np.add.reduceat(items.images[packing.samples], begins).max() <= LIMITS.images,
    }
    wrong = [name for name, holds in right.items() if not holds]
    if wrong:
        raise SystemExit(f"the packing is wrong; does not hold: {'; '.join(wrong)}")


def _compare_rows(items: Items) -> list[Row]:
    packing = pack(items, limits=LIMITS, seed=0)
    check_packing(packing, items)
    by_task = pack_by_group(items, np.minimum(items.images, 2), limits=LIMITS, seed=0)
    images = items.select(np.flatnonzero(~items.is_text))
    without_text = pack(images, limits=LIMITS, seed=0).num_rows
    ours, size = packing.num_rows, f"{len(items):,} samples"
    at_goal = math.ceil(int(items.lengths.sum()) / (MIN_FILL * ROW))
    rows = [
        _rows(f"rows, {size}; reference {100 * MIN_FILL:.0f} % fill", ours, at_goal, goal=1.0),
        _rows(f"rows, {size}; reference first-fit decreasing", ours, first_fit_decreasing(items.lengths), goal=1.0),
        _rows(f"rows, {size}; reference next-fit", ours, next_fit(items), goal=None),
        _rows(
            f"rows of the {len(images):,} with images alone; reference first-fit decreasing",
            without_text,
            first_fit_decreasing(images.lengths),
            goal=1.0,
        ),
        _rows(f"rows of one task each, {size}; reference mixed rows", by_task.num_rows, ours, goal=None),
    ]
    for row, packed in zip(rows, (items, items, items, images, items), strict=True):
        filled = [f"{100 * fill(packed, int(count)):.2f} %" for count in (row.ours, row.reference)]
        _print(row, f"{row.ours:,.0f} and {row.reference:,.0f} rows, filled {' and '.join(filled)}")
    return rows


def _compare_times(times: dict[str, Times], counts: list[int]) -> list[Row]:
    smallest, largest = str(counts[0]), str(counts[-1])
    for count in counts:
        wall, cpu = Spread.of(times[str(count)].wall), Spread.of(times[str(count)].cpu)
        print(f"{count:,} samples: {_seconds(wall)}, CPU {_seconds(cpu)}; {1e9 * wall.middle / count:.0f} ns a sample")
    seconds = median(times[largest].wall)
    each = [median(times[name].wall) / int(name) for name in (largest, smallest)]
    limit = f"seconds, {counts[-1]:,} samples; reference the limit"
    growth = f"seconds a sample, {counts[-1]:,}; reference {counts[0]:,}"
    rows = [
        Row(limit, seconds, MAX_SECONDS, seconds / MAX_SECONDS, 1.0, seconds <= MAX_SECONDS),
        Row(growth, *each, each[0] / each[1], MAX_GROWTH, each[0] <= MAX_GROWTH * each[1]),
    ]
    name = f"seconds, {counts[-1]:,} samples; reference first-fit decreasing, rows only"
    rows.append(compare(name, times[largest], times["first-fit decreasing"], goal=None))
    for row in rows:
        _print(row, f"{row.ours:.3g} and {row.reference:.3g} s")
    return rows


def _rows(name: str, ours: int, reference: int, *, goal: float | None) -> Row:
    return Row(name, ours, reference, ours / reference, goal, None if goal is None else ours <= goal * reference)


def _seconds(spread: Spread) -> str:
    return f"{spread.middle:.2f} s [{spread.low:.2f} .. {spread.high:.2f}]"


def _print(row: Row, figures: str) -> None:
    verdict = "" if row.met is None else f"; goal <= {row.goal:.2f}: {'met' if row.met else 'MISSED'}"
    print(f"{row.name}: {figures}; ratio {row.ratio:.4f}{verdict}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", type=int, default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--turns", type=int, default=5, help="measured turns")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="small streams and two turns: shows that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.turns = [2_000, 20_000], 2
    return options


if __name__ == "__main__":
    main()
