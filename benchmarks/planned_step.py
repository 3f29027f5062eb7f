"""The step times that ``planning/step_time.py`` calculates, beside real training steps of two gloo ranks.

    python benchmarks/planned_step.py [--preset small] [--turns 3] [--steps 2] [--json FILE] [--smoke]

Rates come from no layout that is planned. One process profiles steps of the whole model (``--profile`` of
``tools/train.py``), while the other core does the same. Factors of the parts follow from the profile as for a GPU
(``plan.py --measured``); that command itself refuses it, since a CPU is no GPU that it knows. Two more rates are
measured beside it (``planned_step_rank.py``):

* what a step takes beside its passes is the optimizer. It gives the rate of memory;
* links have the bandwidth and the latency of the exchanges that a layout needs: all-reduces; all-gathers and
  reduce-scatters; messages with their shapes; or both at the size of all gradients. Each is measured at the size that a
  layer or a model has, and at a sixteenth of it.

Each rank has one thread and one core. A CPU copies its own messages, so nothing hides a collective (``Gpu.overlaps``).

The order of two layouts is wrong if the plan says that one is faster, and it is slower by more than the goal. Layouts
that are closer to each other have no order that the goal could tell.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from measure import Row, Spread, describe_machine, write_rows
from planned_layouts import WORLD, Case, Job, layouts, start_ranks, whole_model

from megatron_vl.config.records import Builder
from megatron_vl.planning.calibration import calibrate, describe
from megatron_vl.planning.gpus import Gpu, Link, MeasuredRates
from megatron_vl.planning.stage_profile import StageProfile
from megatron_vl.planning.step_time import StepTime, step_time

GOAL = 1.05
MIXES = ((1, 0.25), (3, 0.25), (1, 1.0), (2, 0.5))
"""Of each micro-batch of the profile: times the images of a row, and the share of positions that are labels. They
differ, so that the parts can be told from each other."""
_PAIR = 2
"""Collectives of an all-reduce, or of an all-gather with a reduce-scatter."""


def main() -> None:
    """Calibrate, plan and measure."""
    options = _parse()
    print(describe_machine())
    job = make_job(options)
    found = _run(job)
    gpus = {kind: _gpu(job.whole, found, kind) for kind in found["exchanges"]}
    _describe(job, found, gpus)
    rows, planned = [], {}
    for case in job.cases:
        plan = step_time(case.config, case.layout, case.row, gpus[exchange_of(case)], WORLD)
        planned[case.name] = plan.seconds
        rows.append(_report(case, plan, found["steps"][case.name]))
    rows.append(_order(planned, {name: median(seconds) for name, seconds in found["steps"].items()}))
    if options.json:
        write_rows(options.json, rows)


def make_job(options: argparse.Namespace) -> Job:
    """Return what the ranks do."""
    cases = layouts(options.preset)
    if options.smoke:
        cases = [case for case in cases if case.name in ("tensor 2", "pipeline 2, virtual 2")]
    whole = whole_model(options.preset)
    model, shown = whole.config.model, whole.workload.images_per_row
    tensor = 4 * max(
        whole.workload.seq_length * model.language.hidden_size,
        shown * model.num_patches * model.vision.hidden_size,
    )
    buckets = 4 * sum(whole.layout.trained) // 32 * 32
    sizes = {"all-reduce": tensor, "gather": tensor, "message": tensor, "buckets": int(buckets)}
    mixes = tuple((images * shown, labels) for images, labels in MIXES)
    return Job(whole, mixes, tuple(cases), sizes, options.turns, options.steps)


def exchange_of(case: Case) -> str:
    """Return the kind of exchange of which a layout has most."""
    parallel = case.config.parallel
    if parallel.tensor_model_parallel_size > 1:
        return "gather" if parallel.sequence_parallel else "all-reduce"
    return "message" if parallel.pipeline_model_parallel_size > 1 else "buckets"


def _run(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path, result = Path(directory) / "job", Path(directory) / "result.json"
        path.write_bytes(pickle.dumps(job))
        start_ranks("planned_step_rank.py", path, result)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def link_of(samples: list[tuple[int, float]], calls: int) -> Link:
    """Return the link whose bandwidth and latency give the seconds of two sizes.

    Args:
        samples: bytes that a rank receives, and seconds.
        calls: collectives or messages of a sample.
    """
    (small, quick), (large, slow) = samples
    bandwidth = (large - small) / max(slow - quick, 1e-9)
    return Link(bandwidth, max(0.0, quick - small / bandwidth) / calls)


def _gpu(whole: Case, found: dict[str, Any], kind: str) -> Gpu:
    """Return what the planner knows of a core that exchanges in one way."""
    link = link_of(found["exchanges"][kind], 1 if kind == "message" else _PAIR)
    rated = Gpu(
        name="cpu",
        memory=1e9,
        peak=found["products"],
        products=found["products"],
        attention=found["attention"],
        memory_rate=1.0,
        nvlink=link,
        network=link,
        host_seconds=0.0,
        overlaps=False,
    )
    moved = step_time(whole.config, whole.layout, whole.row, rated, 1).optimizer  # bytes, at one byte a second
    rated = replace(rated, memory_rate=moved / found["optimizer"])
    return replace(rated, factors=calibrate(_profile(found), rated).factors)


def _profile(found: dict[str, Any]) -> StageProfile:
    profile = Builder().build(MeasuredRates, {"stage_times": found["profile"]}, "the profile").stage_times
    assert isinstance(profile, StageProfile)
    return profile


def _describe(job: Job, found: dict[str, Any], gpus: dict[str, Gpu]) -> None:
    """Print the rates."""
    gpu, profile = gpus["message"], _profile(found)
    print("\n".join(describe(profile, calibrate(profile, gpu), job.whole.config.model)))
    print(
        f"rates: products {gpu.products / 1e9:.1f} GFLOP/s, attention {gpu.attention / 1e9:.1f} GFLOP/s, memory "
        f"{gpu.memory_rate / 1e9:.2f} GB/s (optimizer {found['optimizer']:.3f} s)"
    )
    for kind, own in gpus.items():
        link = own.nvlink
        print(f"link, {kind}: {link.bandwidth / 1e9:.2f} GB/s, {1e6 * link.latency:.0f} us")


def _report(case: Case, plan: StepTime, seconds: list[float]) -> Row:
    """Print and return a comparison: the larger over the smaller."""
    spread, planned = Spread.of(seconds), plan.seconds
    ratio = max(planned, spread.middle) / min(planned, spread.middle)
    met = ratio <= GOAL
    parts = {
        "computation": plan.busiest - plan.exposed_tensor,
        "tensor": plan.exposed_tensor,
        "bubble": plan.bubble,
        "vision": plan.vision,
        "data": plan.exposed_data,
        "optimizer": plan.optimizer,
    }
    shown = " + ".join(f"{name} {value:.3f}" for name, value in parts.items() if value > 0)
    print(
        f"{case.name} ({case.layout.stages}): planned {planned:.3f} s ({shown}), measured {spread.middle:.3f} s "
        f"[{spread.low:.3f} .. {spread.high:.3f}]: {planned / spread.middle - 1:+.1%}, {'met' if met else 'MISSED'}"
    )
    return Row(f"step, {case.name}", planned, spread.middle, ratio, GOAL, met)


def wrong_pairs(planned: dict[str, float], measured: dict[str, float]) -> list[tuple[str, str]]:
    """Return the pairs of layouts that are planned in the wrong order, the one that is planned as faster first."""
    pairs = [sorted(pair, key=planned.__getitem__) for pair in combinations(planned, 2)]
    return [(first, second) for first, second in pairs if measured[first] > GOAL * measured[second]]


def _order(planned: dict[str, float], measured: dict[str, float]) -> Row:
    wrong = wrong_pairs(planned, measured)
    pairs = len(planned) * (len(planned) - 1) // 2
    for first, second in wrong:
        print(f"order: {first} is planned as faster than {second}, and is not")
    print(f"order: {len(wrong)} of {pairs} pairs wrong: {'MISSED' if wrong else 'met'}")
    return Row("pairs of layouts in the wrong order", len(wrong), pairs, len(wrong) / pairs, 0.0, not wrong)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["small", "tiny"], default="small", help="sizes of the model")
    parser.add_argument("--turns", type=int, default=3, help="turns of all layouts")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a layout in a turn, and of the profile")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="the tiny model at two layouts: shows that it runs")
    options = parser.parse_args()
    if options.turns * options.steps < 2:
        parser.error("--turns x --steps is below 2: a spread needs two steps")
    if options.smoke:
        options.preset, options.turns, options.steps = "tiny", 1, 2
    return options


if __name__ == "__main__":
    main()
