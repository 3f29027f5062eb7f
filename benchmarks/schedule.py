"""The simulator of ``planning/simulation.py`` beside Megatron-Core's own schedules, whose stages sleep.

    python benchmarks/schedule.py [--pipeline 2 4 8] [--virtual 1 2] [--micro-batches 32] [--turns 3] [--json FILE]
                                  [--smoke]

The stages are those of the computed layout of Qwen-VL in recipe stage 2. All rows of a step have the same number of
images (none, one, four or seven), or as many as the packed rows of ``stream.py``. Stages sleep in proportion to their
operations (``sleeping.py``). The simulator gets the same durations, and no time for messages. So its error is what it
does not know of the schedule: an order that differs, or a wait. What sleeping, gloo and Python cost besides is in the
measured time.

Compared are the makespan, and the begin of every pass of every rank. A pass that begins early or late shows where the
simulator waits too long or not at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from balance import pack_stream
from measure import Row, Spread, describe_machine, write_rows
from sleeping import Case, SleptStep, case_of, measure
from stream import IMAGE, ROW

from megatron_vl.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import resolve_layout

MODEL = ModelConfig()
GOAL = 1.03
PASS_SECONDS = 0.1
"""What a step takes for each pass of a rank: so much that 1 to 2 ms for sleeping, Python and gloo matter little."""


def main() -> None:
    """Measure every number of ranks and of virtual stages in turn."""
    options = _parse()
    print(describe_machine())
    rows: list[Row] = []
    for size in options.pipeline:
        for virtual in options.virtual:
            cases = make_cases(size, virtual, options.micro_batches, options.images)
            seconds = 2 * virtual * options.micro_batches * options.pass_seconds
            cases = [case.scaled(seconds / case.simulated()) for case in cases]
            rows += _report(cases, measure(cases, turns=options.turns))
    if options.json:
        write_rows(options.json, rows)


def make_cases(size: int, virtual: int, micro_batches: int, images: list[int]) -> list[Case]:
    """Return a case for each number of images, and one for the stream; all in operations."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=size, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
    )
    layout = resolve_layout(RunConfig(model=MODEL, parallel=parallel))
    stream = sorted(pack_stream(20_000).images[:micro_batches].tolist(), reverse=True)
    counts = {f"{count} images": [count] * micro_batches for count in images} | {"stream": stream}
    cases = []
    for name, step in counts.items():
        # A text-only micro-batch has a blank image, so the tower encodes one at least.
        work = [Work(max(count, 1), ROW, ROW**2, ROW - IMAGE * count) for count in step]
        cases.append(case_of(name, layout, work, MODEL))
    return cases


def _report(cases: list[Case], found: dict[str, list[SleptStep]]) -> list[Row]:
    """Print the measured makespans over the simulated ones, and how far from its simulated time a pass begins."""
    rows = []
    for case in cases:
        steps, simulated = found[case.name], case.simulated()
        spread = Spread.of([step.makespan / simulated for step in steps])
        met = spread.middle <= GOAL and 1 / spread.middle <= GOAL
        off = median(_furthest(case, step) for step in steps)
        name = f"pipeline {case.size}, virtual {case.pipeline.virtual}, {case.name}"
        print(
            f"{name}: measured / simulated {spread.middle:.3f} [{spread.low:.3f} .. {spread.high:.3f}]; "
            f"goal within {GOAL}: {'met' if met else 'MISSED'}; passes begin within {off / simulated:.1%} of the step",
            flush=True,
        )
        measured = median(step.makespan for step in steps)
        rows.append(Row(f"makespan, {name}", measured, simulated, spread.middle, GOAL, met))
        share = off / simulated
        rows.append(Row(f"begin of a pass, {name}", off, simulated, share, GOAL - 1, share <= GOAL - 1))
    return rows


def _furthest(case: Case, step: SleptStep) -> float:
    """Return the largest difference between the measured and the simulated begin of a pass, in seconds."""
    both = zip(case.timeline().ranks, step.passes, strict=True)
    return max(
        abs(begin - one.start)
        for simulated, measured in both
        for one, (begin, _) in zip(simulated, measured, strict=True)
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", nargs="+", type=int, default=[2, 4, 8], help="pipeline ranks")
    parser.add_argument("--virtual", nargs="+", type=int, default=[1, 2], help="virtual stages of each rank")
    parser.add_argument("--micro-batches", type=int, default=32, help="of a step, one row each")
    parser.add_argument("--turns", type=int, default=3, help="measured steps of each case, at least 2")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="two ranks, few short micro-batches: shows that it runs")
    options = parser.parse_args()
    options.images, options.pass_seconds = [0, 1, 4, 7], PASS_SECONDS
    if options.smoke:
        options.pipeline, options.micro_batches, options.turns, options.images = [2], 4, 2, [4]
        options.pass_seconds = PASS_SECONDS / 2
    return options


if __name__ == "__main__":
    main()
