"""What is chosen inside a combination: sequence parallelism, and how images are encoded on every rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.planning.gpus import find_gpu
from megatron_vl.planning.plans import Candidate, Question
from megatron_vl.planning.rows import make_row
from megatron_vl.planning.step_time import step_time
from megatron_vl.planning.survey import (
    MICRO,
    PIPELINE,
    RECOMPUTE,
    SHARDED,
    TENSOR,
    VIRTUAL,
    VISION,
    VISION_GRANULARITY,
    VISION_MICRO,
    VISION_RECOMPUTE,
    Survey,
    describe,
)

ROOT = Path(__file__).resolve().parents[3]
ONE = {
    TENSOR: ("--tensor-model-parallel-size", "2"),
    PIPELINE: ("--pipeline-model-parallel-size", "2"),
    VISION: ("--vision-parallel", "data"),
    MICRO: ("--micro-batch-size", "2"),
    RECOMPUTE: ("--recompute-granularity", "full"),
    SHARDED: ("--use-distributed-optimizer",),
    VIRTUAL: (),
}
"""The flags that leave one combination."""


def question(stage: str, *flags: str, num_gpus: int = 64, gpu: str = "h100", fixed: tuple[str, ...] = ()) -> Question:
    found = next((ROOT / "examples" / "qwen_vl").glob(f"{stage}_*.yaml"))
    config = load_config(found, [*(word for words in ONE.values() for word in words), *flags])
    row = make_row(config, images=5, samples=5.5)
    return Question(config, row, find_gpu(gpu), num_gpus, frozenset((*ONE, *fixed)), tolerance=0.5)


def found(asked: Question) -> list[Candidate]:
    survey = Survey(asked)
    survey.look()
    return survey.valid


@pytest.mark.parametrize(
    ("gpu", "samples", "usable"),
    [("h100", 4096, 0.92), ("h100", 4096, 0.4), ("b200", 256, 0.92), ("h100", 4096, 0.01)],
)
def test_images_are_encoded_in_the_fastest_way_that_fits(gpu: str, samples: int, usable: float) -> None:
    """Beside all eighteen ways, each with its own memory and its own step; where none fits, in the smallest."""
    asked = replace(question("stage2", "--global-batch-samples", str(samples), gpu=gpu), usable=usable)
    (chosen,) = found(asked)
    parallel = chosen.config.parallel
    every = []
    for size, again, granularity in product((1, 2, 4, 8, 16, 32), (True, False), ("images", "layers")):
        if granularity == "layers" and not again:
            continue  # the trainer refuses it
        way = replace(
            parallel,
            vision_micro_batch_size=size,
            vision_recompute=again,
            vision_recompute_granularity=granularity,
        )
        one = describe(asked, replace(chosen.config, parallel=way))
        seconds = step_time(one.config, one.layout, asked.row, asked.gpu, 64).seconds
        every.append((one.fullest.total, seconds))
    fitting = [seconds for total, seconds in every if total <= asked.limit]
    assert describe(asked, chosen.config).memory == chosen.memory
    if not fitting:
        assert chosen.fullest.total == min(every)[0]
        return
    assert chosen.fullest.total <= asked.limit
    seconds = step_time(chosen.config, chosen.layout, asked.row, asked.gpu, 64).seconds
    assert seconds == pytest.approx(min(fitting), rel=1e-3)


def test_few_images_are_kept_and_many_are_encoded_again() -> None:
    """Of a step of 256 samples each rank has 48 x 5 / 64 = 3.75 images of 2.97 GB; of 4,096, 16 times as many.

    These keep the inputs of layers, 2 x 1664 x 1024 x 48 bytes = 0.16 GB, and the resampler's part; or nothing.
    """
    ways = [
        found(
            question(
                "stage2", "--global-batch-samples", samples, "--recompute-granularity", "none", *given, fixed=fixed
            )
        )
        for samples, given, fixed in (
            ("256", (), ()),
            ("4096", (), ()),
            ("4096", ("--vision-recompute-granularity", "images"), (VISION_GRANULARITY,)),
        )
    ]
    parallel = [one.config.parallel for (one,) in ways]
    assert [(one.vision_recompute, one.vision_recompute_granularity) for one in parallel] == [
        (False, "images"), (True, "layers"), (True, "images"),
    ]  # fmt: skip
    assert [one.vision_micro_batch_size for one in parallel] == [8, 32, 8]


def test_a_way_to_encode_that_is_given_stays() -> None:
    flags = ("--vision-micro-batch-size", "4", "--vision-recompute")
    (chosen,) = found(question("stage2", *flags, fixed=(VISION_MICRO, VISION_RECOMPUTE)))
    assert (chosen.config.parallel.vision_micro_batch_size, chosen.config.parallel.vision_recompute) == (4, True)


def test_a_frozen_tower_has_nothing_to_encode_again() -> None:
    (chosen,) = found(question("stage3", "--global-batch-samples", "2816"))
    assert chosen.config.parallel.vision_recompute  # the usual value


@pytest.mark.parametrize(("tensor", "divided"), [(2, True), (4, False), (8, False)])
def test_sequence_parallelism_is_left_out_where_fp8_forbids_it(tensor: int, divided: bool) -> None:
    """224 pixels are 256 patches: 128 of each of two ranks, as blocks of FP8 need, and 64 of each of four."""
    flags = ("--tensor-model-parallel-size", str(tensor), "--vision-parallel", "pipeline", "--image-size", "224")
    fp8 = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--fp8-parts", "both")
    (chosen,) = found(question("stage2", *flags, *fp8))
    assert chosen.config.parallel.sequence_parallel == divided
    (plain,) = found(question("stage2", *flags))
    assert plain.config.parallel.sequence_parallel


def test_a_family_that_no_choice_makes_valid_names_the_reason() -> None:
    """42 pixels are 9 patches."""
    asked = question(
        "stage2", "--vision-parallel", "pipeline", "--image-size", "42", "--fp8-format", "hybrid", "--fp8-parts", "both"
    )
    survey = Survey(asked)
    survey.look()
    assert (
        not survey.valid and "positions in multiples of 16, but model.vision has images of 3 x 3" in survey.invalid[0]
    )
