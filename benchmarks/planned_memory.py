"""The peak memory that ``planning/memory.py`` says, beside that of real training steps of two gloo ranks.

    python benchmarks/planned_memory.py [--preset small] [--json FILE] [--smoke]

Each rank counts the bytes of the tensors that live, and keeps the peak of one step after a warm-up
(``planned_memory_rank.py``). The plan is that of the same run in fp32 with the local backend, which keeps as much on a
CPU as on a GPU: state, activations that the schedule holds, logits, gradients on their way, and messages.

The rows of a step are no part of a plan. The state in the rows "before the step" has them, and what a step finds in
front of it besides. What is resident grows by more, by what torch does not count (the rank says what). That is printed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row, describe_machine, write_rows
from planned_layouts import WORLD, Case, layouts, recomputed, start_ranks

from megatron_vl.planning.memory import RankMemory, rank_memories

GOAL = 1.05
MEGABYTE = 1e6


def main() -> None:
    """Compare every rank of every layout."""
    options = _parse()
    print(describe_machine())
    cases = [*layouts(options.preset), *recomputed(options.preset)]
    if options.smoke:
        cases = [case for case in cases if case.name in ("tensor 2", "pipeline 2, virtual 2")]
    found = _run(cases)
    rows = [row for case in cases for row in _compare(case, found[case.name])]
    judged = [row for row in rows if row.met is not None]
    print(f"{sum(bool(row.met) for row in judged)} of {len(judged)} within {GOAL}")
    if options.json:
        write_rows(options.json, rows)


def _run(cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank found at each layout."""
    with tempfile.TemporaryDirectory() as directory:
        job, result = Path(directory) / "job", Path(directory) / "result.json"
        job.write_bytes(pickle.dumps(cases))
        start_ranks("planned_memory_rank.py", job, result)
        found: dict[str, list[dict[str, Any]]] = json.loads(result.read_text())
        return found


def _compare(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Print and yield the comparison of each rank."""
    plans = rank_memories(
        case.config,
        case.layout,
        case.row.computed(case.config),
        world_size=WORLD,
        micro_batches=case.micro_batches,
    )
    for number, rank in enumerate(found):
        plan = plans[rank["pipeline_rank"]]
        name = f"{case.name}, rank {number}"
        state = plan.weights + plan.gradients + plan.optimizer
        peak = _row(f"peak, {name}", plan.total, rank["peak"], GOAL)
        before = _row(f"before the step, {name}", state, rank["before"], None)
        step = _row(f"in the step, {name}", plan.total - state, rank["peak"] - rank["before"], None)
        print(
            f"{name} ({_parts(plan)}): planned {plan.total / MEGABYTE:.1f} MB, measured {rank['peak'] / MEGABYTE:.1f}: "
            f"{peak.ours / peak.reference - 1:+.1%}, {'met' if peak.met else 'MISSED'}; of it in the step "
            f"{step.ours / MEGABYTE:.1f} and {step.reference / MEGABYTE:.1f}; resident grew by {_grown(rank)}",
            flush=True,
        )
        yield from (peak, before, step)


def _row(name: str, planned: float, measured: float, goal: float | None) -> Row:
    """Return a comparison: the larger over the smaller."""
    ratio = max(planned, measured) / min(planned, measured)
    return Row(name, planned, measured, ratio, goal, None if goal is None else ratio <= goal)


def _parts(plan: RankMemory) -> str:
    named = {
        "state": plan.weights + plan.gradients + plan.optimizer,
        "activations": plan.activations,
        "logits": plan.logits,
        "working": plan.working,
        "messages": plan.communication,
    }
    return ", ".join(f"{name} {size / MEGABYTE:.1f}" for name, size in named.items())


def _grown(rank: dict[str, Any]) -> str:
    return "no one knows" if rank["resident"] is None else f"{rank['resident'] / MEGABYTE:.0f} MB"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["small", "tiny"], default="small", help="sizes of the model")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="the tiny model at two layouts: shows that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.preset = "tiny"
    return options


if __name__ == "__main__":
    main()
