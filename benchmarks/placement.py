"""What the place of the vision tower costs a pipeline, on Megatron-Core's own schedules.

    python benchmarks/placement.py [--pipeline 2 4 8] [--micro-batches 32] [--turns 5] [--json FILE] [--smoke]

The stages are those of Qwen-VL at its published sizes in recipe stage 2. They sleep in proportion to their operations
(``sleeping.py``), so this is no measurement of a GPU.

The places of the tower:

* on stage 0, whole, with the language layers split evenly;
* ``auto``, the computed layout;
* ``data``: every rank encodes its share of the step's images before the schedule, and goes backward through it after.
  What the backward pass needs is kept, or the images are encoded twice.

The reference has the work of one forward and one backward pass in equal parts: each stage takes the average time for
each micro-batch. Rows have four images each, for which ``auto`` is made, or as many as the packed rows of
``stream.py``, the most expensive first, as the loader orders them. The work of the head depends on the labels, so it is
less where there are more images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

from balance import pack_stream
from measure import Row, Spread, describe_machine, ratios, write_rows
from sleeping import Case, case_of, measure, operations
from stream import IMAGE, ROW

from megatron_vl.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_vl.data.loading.balance import image_shares
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import PipelineLayout, parse_layout, resolve_layout, vision_part

MODEL = ModelConfig()
EVEN = 4
STAGE_SECONDS = 0.06
"""What an average stage takes for an average micro-batch, forward and backward."""
FIRST, AUTO, KEPT, TWICE = "tower on stage 0", "auto", "data, kept", "data, encoded twice"
GOALS = {
    "4 images": {2: {AUTO: 0.95}, 4: {AUTO: 0.95}, 8: {AUTO: 0.95}},
    "stream": {2: {AUTO: 0.92, KEPT: 0.97}, 4: {AUTO: 0.87, KEPT: 0.97}, 8: {AUTO: 0.85, KEPT: 0.97}},
}
"""Efficiency: the makespan of equal stages over that of the place, by rows, ranks and place."""


def main() -> None:
    """Measure every number of pipeline ranks in turn."""
    options = _parse()
    print(describe_machine())
    count = options.micro_batches
    stream = sorted(pack_stream(100_000).images[:count].tolist(), reverse=True)
    print(f"images of the {count} micro-batches of the stream: {' '.join(map(str, stream))}")
    steps = {"4 images": [EVEN] * count, "stream": stream}
    rows: list[Row] = []
    for size in options.pipeline:
        for name in options.steps:
            cases = [case.scaled(options.speed) for case in make_cases(steps[name], size)]
            found = measure(cases, turns=options.turns)
            makespans = {case: [step.makespan for step in own] for case, own in found.items()}
            rows += _report(name, size, makespans)
    if options.json:
        write_rows(options.json, rows)


def make_cases(images: list[int], size: int) -> list[Case]:
    """Return the reference and each place of the tower.

    Args:
        images: the number of images of each micro-batch.
        size: the number of pipeline ranks.
    """
    config = RunConfig(model=MODEL, parallel=ParallelConfig(pipeline_model_parallel_size=size))
    even = MODEL.language.num_layers // size
    first = f"V*{MODEL.vision.num_layers}R" + "|".join([f"L*{even}"] * size)
    language = resolve_layout(replace(config, parallel=replace(config.parallel, vision_parallel="data")))
    places = [
        _in_pipeline(FIRST, parse_layout(first, model=MODEL, pipeline_size=size), images),
        _in_pipeline(AUTO, resolve_layout(config), images),
        _on_every_rank(KEPT, language, images, twice=False),
        _on_every_rank(TWICE, language, images, twice=True),
    ]
    equal = _equal(images, size)
    factor = STAGE_SECONDS / (equal.forward[0][0] + equal.backward[0][0])
    return [case.scaled(factor) for case in (equal, *places)]


def _equal(images: list[int], size: int) -> Case:
    whole = PipelineLayout.whole(MODEL).stages[0]
    passes = [operations(whole, _row(count), MODEL) for count in images]
    forward, backward = (sum(values) / len(images) / size for values in zip(*passes, strict=True))
    return Case(
        "equal stages",
        [[forward] * len(images)] * size,
        [[backward] * len(images)] * size,
        [0.0] * size,
        [0.0] * size,
    )


def _in_pipeline(name: str, layout: PipelineLayout, images: list[int]) -> Case:
    """A text-only micro-batch has a blank image, so the tower encodes one at least."""
    return case_of(name, layout, [replace(_row(count), num_images=max(count, 1)) for count in images], MODEL)


def _row(images: int) -> Work:
    return Work(images, ROW, ROW**2, ROW - IMAGE * images)


def _on_every_rank(name: str, language: PipelineLayout, images: list[int], *, twice: bool) -> Case:
    case = _in_pipeline(name, language, images)
    size = len(language.stages)
    forward, backward = operations(vision_part(MODEL), _row(1), MODEL)
    own = [sum(map(len, image_shares(images, rank=rank, size=size))) for rank in range(size)]
    after = backward + (forward if twice else 0.0)
    return replace(case, before=[count * forward for count in own], after=[count * after for count in own])


def _report(name: str, size: int, found: dict[str, list[float]]) -> list[Row]:
    """Print the efficiency of each place, and return its row: makespan over that of equal stages."""
    equal = found.pop("equal stages")
    rows = []
    for place, seconds in found.items():
        efficiency = Spread.of([1 / ratio for ratio in (a / b for a, b in zip(seconds, equal, strict=True))])
        goal = GOALS[name].get(size, {}).get(place)
        ratio = ratios(seconds, equal).middle
        met = None if goal is None else ratio <= 1 / goal
        said = "" if goal is None else f"; goal {goal}: {'met' if met else 'MISSED'}"
        print(
            f"pipeline {size}, {name}, {place}: efficiency {efficiency.middle:.3f} "
            f"[{efficiency.low:.3f} .. {efficiency.high:.3f}]{said}"
        )
        title = f"makespan, pipeline {size}, {name}, {place}; reference equal stages"
        rows.append(Row(title, median(seconds), median(equal), ratio, None if goal is None else 1 / goal, met))
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", nargs="+", type=int, default=[2, 4, 8], help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, default=32, help="of a step, one row each")
    parser.add_argument("--turns", type=int, default=5, help="measured steps of each place")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="two ranks, few short micro-batches: shows that it runs")
    options = parser.parse_args()
    options.steps, options.speed = ["4 images", "stream"], 1.0
    if options.smoke:
        options.pipeline, options.micro_batches, options.turns = [2], 4, 2
        options.steps, options.speed = ["stream"], 0.2
    return options


if __name__ == "__main__":
    main()
