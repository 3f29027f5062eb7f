"""How evenly the rows of a global batch are dealt over data-parallel ranks, beside the usual deals.

    python benchmarks/balance.py [--ranks 8 64 256] [--batches 50] [--turns 7] [--json FILE] [--smoke]

Rows are those that the packer makes of the stream of ``stream.py``, in the order in which a run takes them, 16 a rank.
The model is Qwen-VL at its published sizes. The work of a row is what ``planning/flops.py`` counts for it, padding,
labels and attention over the whole row included; of what a row holds the deals know only what the loader does: its
length and its number of images.

The efficiency of a batch is the work of the average rank over that of the most loaded one, for which the others wait at
the end of a step. In lock step they would wait at each of its 16 micro-batches. The references are: as they come, in a
snake over the sorted rows, and to the rank with least work (LPT).
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from measure import Row, Spread, Times, compare, describe_machine, take_turns, write_rows
from stream import IMAGE, ROW, check_stream, make_stream

from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.data.dataset.rows import MAX_IMAGES_PER_ROW
from megatron_vl.data.loading.balance import deal, row_costs, split
from megatron_vl.data.loading.blend import Blend
from megatron_vl.data.prepare.packing import IntArray, PackLimits, pack
from megatron_vl.planning.flops import FrozenParts, Work, image_cost, step_flops

MICRO_BATCHES = 16
GOAL = 0.995
LARGER_MICRO_BATCH = 4


@dataclass(frozen=True)
class PackedRows:
    """What the packer made of the stream, one entry a row."""

    lengths: IntArray
    images: IntArray
    squares: IntArray
    """Sum of the squared lengths of the row's segments."""

    @property
    def labels(self) -> IntArray:
        """Tokens outside images; all count as supervised."""
        return self.lengths - IMAGE * self.images

    def work(self, config: RunConfig, *, segments: bool = False) -> npt.NDArray[np.float64]:
        """Operations of each row; ``segments``: tokens attend to their own segment only."""
        squares = self.squares if segments else np.full(len(self.lengths), ROW**2)
        work = Work(self.images, np.full(len(self.lengths), ROW), squares, self.labels)
        return step_flops(config.model, FrozenParts.of(config.training), work)

    def costs(self, config: RunConfig) -> IntArray:
        """What the loader takes for the work of each row."""
        return row_costs(
            self.lengths, self.images, image_cost=image_cost(config.model, FrozenParts.of(config.training))
        )


def main() -> None:
    """Deal batches at every number of ranks, with the vision tower trained and frozen, and time the deal."""
    options = _parse()
    print(describe_machine())
    print(check_stream())
    packed = pack_stream(options.samples)
    print(f"{len(packed.lengths):,} rows of {options.samples:,} samples: {packed.images.mean():.2f} images a row")
    rows = []
    for frozen in (False, True):
        config = RunConfig(training=TrainingConfig(freeze_vision=frozen))
        for ranks in options.ranks:
            rows += _compare_deals(packed, config, ranks=ranks, most_batches=options.batches)
    rows += [_compare_micro_batches(packed, ranks) for ranks in options.ranks]
    rows += [_compare_times(packed, ranks, turns=options.turns) for ranks in options.ranks]
    if options.json:
        write_rows(options.json, rows)


def pack_stream(count: int) -> PackedRows:
    """Pack the stream in mixed rows."""
    items = make_stream(count)
    packing = pack(items, limits=PackLimits(ROW, MAX_IMAGES_PER_ROW), seed=0)
    begins, sizes = packing.row_splits[:-1], packing.stops - packing.starts
    images = np.add.reduceat(items.images[packing.samples], begins)
    return PackedRows(np.add.reduceat(sizes, begins), images, np.add.reduceat(sizes**2, begins))


def as_they_come(costs: IntArray, num_ranks: int) -> IntArray:
    """int64[ranks, rows]: the batch cut into equal parts; its rows are in random order."""
    return np.arange(len(costs)).reshape(num_ranks, -1)


def snake(costs: IntArray, num_ranks: int) -> IntArray:
    """int64[ranks, rows]: sorted rows to the ranks in order, then back, and so on."""
    turns = np.argsort(-costs, kind="stable").reshape(-1, num_ranks)
    turns[1::2] = turns[1::2, ::-1]
    return turns.T


def least_loaded(costs: IntArray, num_ranks: int) -> IntArray:
    """int64[ranks, rows]: the most expensive row first, each to the least loaded rank that still takes rows (LPT)."""
    size = len(costs) // num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    ranks = [(0, rank) for rank in range(num_ranks)]
    for row in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(ranks)
        dealt[rank].append(row)
        if len(dealt[rank]) < size:
            heapq.heappush(ranks, (load + int(costs[row]), rank))
    return np.array(dealt)


def ours(costs: IntArray, num_ranks: int) -> IntArray:
    """int64[ranks, rows]: as the loader does."""
    return deal(costs, num_ranks=num_ranks)


DEALS: dict[str, Callable[[IntArray, int], IntArray]] = {
    "ours": ours,
    "as they come": as_they_come,
    "snake": snake,
    "LPT": least_loaded,
}


def efficiency(loads: npt.NDArray[np.generic]) -> float:
    """Mean over maximum."""
    return float(loads.mean() / loads.max())


def _compare_deals(packed: PackedRows, config: RunConfig, *, ranks: int, most_batches: int) -> list[Row]:
    """Deal the batches of one number of ranks in every way."""
    size, whole, segments = ranks * MICRO_BATCHES, packed.work(config), packed.work(config, segments=True)
    costs, blend = packed.costs(config), Blend((len(whole),), None, seed=0)
    batches = [blend.step_rows(first * size, size) for first in range(min(most_batches, len(whole) // size))]
    title = f"DP {ranks}, ViT {'frozen' if config.training.freeze_vision else 'trained'}"
    found = {}
    for name, way in DEALS.items():
        measured = []
        for batch in batches:
            dealt = batch[way(costs[batch], ranks)]
            lock_step = whole[dealt].mean() / whole[dealt].max(axis=0).mean()
            sums = [column[dealt].sum(axis=1) for column in (whole, packed.images, packed.lengths, segments)]
            measured.append([lock_step, *map(efficiency, sums)])
        found[name] = np.array(measured)
        lock_step, work, images, tokens, in_segments = found[name].mean(axis=0)
        print(
            f"{title}, {name}: work {work:.4f} (least of {len(batches)} batches {found[name][:, 1].min():.4f}), images "
            f"{images:.4f}, tokens {tokens:.4f}; attention inside segments {in_segments:.4f}; lock step {lock_step:.4f}"
        )
    mean = {name: values.mean(axis=0).tolist() for name, values in found.items()}
    rows = [_row(f"{title}; reference a perfect deal", mean["ours"][1], 1.0, goal=1 / GOAL)]
    rows += [_row(f"{title}; reference {name}", mean["ours"][1], mean[name][1], goal=None) for name in list(DEALS)[1:]]
    rows.append(
        _row(f"{title}, lock step; reference as they come", mean["ours"][0], mean["as they come"][0], goal=None)
    )
    return rows


def _row(name: str, mine: float, other: float, *, goal: float | None) -> Row:
    """The most loaded rank's work in that of the average, ours beside a reference, from efficiencies."""
    row = Row(f"most loaded rank / average, {name}", 1 / mine, 1 / other, other / mine, goal, None)
    if goal is None:
        return row
    row = Row(row.name, row.ours, row.reference, row.ratio, goal, row.ratio <= goal)
    print(f"{row.name}: {row.ours:.4f}; goal <= {goal:.4f} (efficiency {GOAL}): {'met' if row.met else 'MISSED'}")
    return row


def _compare_micro_batches(packed: PackedRows, ranks: int) -> Row:
    """How alike the micro-batches of a rank are, of several rows each, in one batch."""
    size, config = ranks * MICRO_BATCHES * LARGER_MICRO_BATCH, RunConfig()
    batch = Blend((len(packed.lengths),), None, seed=0).step_rows(0, size)
    costs, work = packed.costs(config)[batch], packed.work(config)[batch]
    parts = [split(costs, rank, num_micro_batches=MICRO_BATCHES) for rank in deal(costs, num_ranks=ranks)]
    plain = np.arange(size).reshape(ranks, MICRO_BATCHES, LARGER_MICRO_BATCH)
    mine, other = (
        float(np.mean([efficiency(work[rank].sum(axis=1)) for rank in dealt])) for dealt in (np.stack(parts), plain)
    )
    name = f"largest micro-batch of {LARGER_MICRO_BATCH} rows / average of its rank, DP {ranks}; reference as they come"
    print(f"{name}: {1 / mine:.4f} and {1 / other:.4f}")
    return Row(name, 1 / mine, 1 / other, other / mine, None, None)


def _compare_times(packed: PackedRows, ranks: int, *, turns: int) -> Row:
    """What a rank spends on finding its rows, in each step."""
    size = ranks * MICRO_BATCHES
    order = Blend((len(packed.lengths),), None, seed=0).step_rows(0, size * LARGER_MICRO_BATCH)
    larger = packed.costs(RunConfig())[order]
    costs = larger[:size]
    times = take_turns(
        {
            "ours": lambda: split(costs, deal(costs, num_ranks=ranks)[0], num_micro_batches=MICRO_BATCHES),
            "larger": lambda: split(larger, deal(larger, num_ranks=ranks)[0], num_micro_batches=MICRO_BATCHES),
            "LPT": lambda: least_loaded(costs, ranks),
        },
        turns=turns,
    )
    row = compare(f"seconds of a deal, DP {ranks}; reference LPT", times["ours"], times["LPT"], goal=None)
    figures = ", ".join(f"{name} {_milliseconds(times[name])}" for name in ("ours", "LPT", "larger"))
    print(f"DP {ranks}, a deal: {figures} ({LARGER_MICRO_BATCH} rows a micro-batch)")
    return row


def _milliseconds(times: Times) -> str:
    spread = Spread.of(times.wall)
    return f"{1e3 * spread.middle:.2f} ms [{1e3 * spread.low:.2f} .. {1e3 * spread.high:.2f}]"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256], help="data-parallel ranks")
    parser.add_argument("--samples", type=int, default=3_000_000, help="samples that are packed")
    parser.add_argument("--batches", type=int, default=50, help="global batches at most")
    parser.add_argument("--turns", type=int, default=7, help="measured deals of each contender")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="few rows and ranks, two turns: shows that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.ranks, options.samples, options.batches, options.turns = [4], 2_000, 2, 2
    return options


if __name__ == "__main__":
    main()
