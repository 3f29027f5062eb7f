"""Which plans are found, in what order, and what is said where there is none."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.errors import ConfigError
from megatron_vl.planning.gpus import find_gpu
from megatron_vl.planning.plans import Answer, Question, in_thousandths
from megatron_vl.planning.rows import assumed_row, make_row
from megatron_vl.planning.search import search
from megatron_vl.planning.step_time import step_time
from megatron_vl.planning.summary import describe_best, describe_plans, reasons
from megatron_vl.planning.survey import Survey, describe

ROOT = Path(__file__).resolve().parents[3]
MICRO, TENSOR = "training.micro_batch_size", "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"


def recipe(stage: str, *flags: str) -> RunConfig:
    return load_config(next((ROOT / "examples" / "qwen_vl").glob(f"{stage}_*.yaml")), flags)


def question(
    config: RunConfig, num_gpus: int, gpu: str = "h100", *, samples: float = 5.5, fixed: tuple[str, ...] = ()
) -> Question:
    images = min(5.0, samples)
    return Question(config, make_row(config, images=images, samples=samples), find_gpu(gpu), num_gpus, frozenset(fixed))


@pytest.fixture(scope="module")
def answer() -> Answer:
    return search(question(recipe("stage2"), 8))


def test_plans_are_valid_fit_and_come_in_order(answer: Answer) -> None:
    assert len(answer.plans) == 5 and len({plan.candidate.family for plan in answer.plans}) == 5
    for plan in answer.plans:
        validate(plan.candidate.config, world_size=8, cuda=True)
        assert plan.candidate.fullest.total <= 0.92 * 80e9
        assert 0 < plan.mfu < 0.8
        assert plan.gpu_hours == pytest.approx(8 * plan.time.seconds * 19_000 / 3600)
    times = [plan.seconds_per_row for plan in answer.plans]
    assert times == pytest.approx(sorted(times), rel=1e-3)
    assert answer.num_fitting < answer.num_valid


def test_the_best_plan_is_that_of_trying_everything() -> None:
    """Bounds skip most simulations; none of those may be faster."""
    asked = question(recipe("stage2"), 4, "b200")
    survey = Survey(asked)
    survey.look()
    fitting = [one for one in survey.valid if one.fullest.total <= asked.limit]
    times = [
        step_time(one.config, one.layout, asked.row, asked.gpu, 4).seconds / one.config.training.global_batch_size
        for one in fitting
    ]
    assert search(asked).plans[0].seconds_per_row == pytest.approx(min(times), rel=1e-3)


def test_times_are_equal_only_within_a_thousandth() -> None:
    """Three digits would take 10.10 s and 10.14 s for the same."""
    assert in_thousandths(0.01013) - in_thousandths(0.01009) == 4
    assert in_thousandths(9.9995) == in_thousandths(9.9999) and in_thousandths(0.0) < in_thousandths(1e-9)


def test_rejections_have_their_arithmetic(answer: Answer) -> None:
    assert "tensor 1, pipeline 1, no full recomputation" in answer.rejected[0]
    size = float(answer.rejected[0].split(": ")[1].split(" GB")[0])
    assert answer.rejected[0].endswith(f"{size} GB on the fullest rank > 80 GB x 0.92")
    assert size > 73.6


def test_every_plan_has_a_reason(answer: Answer) -> None:
    told = [reasons(plan, answer.plans) for plan in answer.plans]
    assert told[0][0] == "fastest" and all(told)
    assert sum("least memory" in one for one in told) == 1


def test_fields_that_are_given_stay() -> None:
    config = recipe("stage2", "--tensor-model-parallel-size", "2", "--micro-batch-size", "2")
    found = search(question(config, 16, fixed=(TENSOR, MICRO)))
    for plan in found.plans:
        parallel = plan.candidate.config.parallel
        assert parallel.tensor_model_parallel_size == 2 and plan.candidate.config.training.micro_batch_size == 2
        assert parallel.sequence_parallel
        assert parallel.overlap_grad_reduce == parallel.overlap_param_gather == (plan.candidate.data_parallel > 1)


def test_stages_of_a_written_layout_decide_the_sizes() -> None:
    config = recipe("stage2", "--pipeline-layout", "V*30|V*18RL*5|L*14|L*13")
    found = search(question(config, 16, "h200", fixed=("parallel.pipeline_layout",)))
    sizes = {
        (plan.candidate.layout.stages.pipeline_size, plan.candidate.layout.stages.virtual_size) for plan in found.plans
    }
    assert sizes <= {(4, 1), (2, 2)}
    assert any("has 4 stages, but pipeline_model_parallel_size 1" in line for line in found.rejected)


def test_samples_that_do_not_divide_are_refused_beyond_the_tolerance() -> None:
    asked = question(recipe("stage3"), 32, samples=3)
    lines = search(asked).rejected
    assert any(
        "data 16 x micro-batch 1 is 48 rows x 3 samples = 144, which is +12% of the recipe's 128" in one
        for one in lines
    )
    wider = search(replace(asked, tolerance=0.13))
    assert wider.num_valid > search(asked).num_valid
    assert all(abs(plan.candidate.config.training.global_batch_size * 3 / 128 - 1) <= 0.13 for plan in wider.plans)


def test_no_valid_layout_says_why() -> None:
    config = recipe("stage2", "--tensor-model-parallel-size", "3")
    with pytest.raises(ConfigError, match=r"num_attention_heads \d+ cannot be split over .*size 3 ranks"):
        search(question(config, 6, fixed=(TENSOR,)))
    config = recipe("stage2", "--tensor-model-parallel-size", "4")
    with pytest.raises(ConfigError, match=r"the run has 6 ranks, but .*size 4 x"):
        search(question(config, 6, fixed=(TENSOR,)))
    pipeline = "parallel.pipeline_model_parallel_size"
    config = recipe("stage2", "--pipeline-model-parallel-size", "96")
    with pytest.raises(ConfigError, match=r"= 96 stages, but the model has 82 units"):
        search(question(config, 96, fixed=(pipeline,)))
    rows = replace(config.training, global_batch_samples=None, global_batch_size=10)
    with pytest.raises(ConfigError, match=r"global_batch_size is 10 rows, which is not a multiple"):
        search(question(replace(recipe("stage2"), training=rows), 7, fixed=(pipeline,)))


def test_nothing_fits_names_the_smallest_need_and_what_helps() -> None:
    with pytest.raises(ConfigError) as caught:
        search(question(recipe("stage2"), 1, "h100"))
    told = str(caught.value)
    assert "nothing fits 1 x h100: the smallest need is 17" in told and "80 GB x 0.92 = 73.6 GB are usable" in told
    assert "full recomputation, micro-batch 1" in told
    # 18 bytes for each of 9.66 billion parameters are 174 GB: one GB200 has 186 x 0.92 = 171, two ranks need 87 each.
    assert "--gpu gb200" not in told and "What helps: --gpus 4, where tensor" in told


ONE_LAYOUT = ("--micro-batch-size", "1", "--recompute-granularity", "full")
OF_ONE_LAYOUT = (MICRO, "training.recompute_granularity")


def refusal(asked: Question, usable: float) -> str:
    with pytest.raises(ConfigError) as caught:
        search(replace(asked, usable=usable))
    return str(caught.value)


def test_more_gpus_are_advised_only_if_they_help() -> None:
    """A rank of any number needs more than 80 MB: a layer of the language model alone has 0.2 billion parameters."""
    config = recipe("stage2", "--tensor-model-parallel-size", "1", *ONE_LAYOUT)
    told = refusal(question(config, 1, fixed=(TENSOR, *OF_ONE_LAYOUT)), 0.001)
    assert "80 GB x 0.001 = 0.08 GB are usable. Neither another GPU nor more of them help: the fullest of 64" in told
    told = refusal(question(config, 8, fixed=(TENSOR, *OF_ONE_LAYOUT)), 0.001)
    assert "What helps: --usable-memory 0.92, as usual" in told and "--gpus" not in told


def test_flags_that_keep_a_run_from_fitting_are_named() -> None:
    """With everything on one rank of eight, 7.5 bytes for each of 9.66 billion parameters leave 1.2 GB of 73.6."""
    sizes = ("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1")
    told = refusal(question(recipe("stage2", *sizes, *ONE_LAYOUT), 8, fixed=(TENSOR, PIPELINE, *OF_ONE_LAYOUT)), 0.92)
    assert "without the flags that set the layout, tensor " in told
    assert "; --gpu h200 or b200 or gb200; --gpus 16, where tensor 1, pipeline 1, " in told


def test_assumed_rows() -> None:
    config = recipe("stage2")
    row = assumed_row(config)
    assert (row.images, row.samples, row.tokens, row.supervised) == (4, 4, 2048, 2048 - 4 * 258)
    assert row.sum_squared_spans == 2048**2
    assert make_row(recipe("stage1"), images=6, samples=6.4).sum_squared_spans == pytest.approx(2048**2 / 6.4)
    unpacked = replace(config, data=replace(config.data, unpacked=True))
    assert (assumed_row(unpacked).images, assumed_row(unpacked).samples) == (1, 1)
    with pytest.raises(ConfigError, match=r"cannot hold 8 images of 256 \+ 2 positions \(= 2064\)"):
        make_row(config, images=8, samples=8)


def test_a_tiny_model_can_be_planned() -> None:
    config = recipe("stage2", "--preset", "tiny")
    tiny = replace(config, model=PRESETS["tiny"])
    row = make_row(tiny, images=20, samples=20)
    asked = Question(tiny, row, find_gpu("a100"), 4)
    plan = search(asked).plans[0]
    assert plan.candidate.fullest.total < 1e9
    told = "\n".join([*describe_plans([plan]), *describe_best(asked, plan, 1)])
    assert " 0.0 GB" not in told and " 0.00 " not in told and " 0.000 " not in told  # two digits at least


def test_the_planner_knows_every_field_of_the_layout() -> None:
    """A new field changes what runs where. Memory, time and the search have to know it before it is added here."""
    searched = {
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
        "pipeline_layout", "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce",
        "overlap_param_gather", "backend", "vision_parallel", "vision_micro_batch_size", "vision_recompute",
        "vision_recompute_granularity",
    }  # fmt: skip
    changes_nothing = {"distributed_timeout_minutes"}
    assert {item.name for item in fields(ParallelConfig)} == searched | changes_nothing


VISION_MICRO, REDUCE = "parallel.vision_micro_batch_size", "parallel.overlap_grad_reduce"
GATHER, SHARDED = "parallel.overlap_param_gather", "parallel.use_distributed_optimizer"


def test_options_of_one_place_of_the_vision_part_leave_the_other_open() -> None:
    """``vision_micro_batch_size`` has no effect where stages hold the vision part, and would be refused there."""
    plain = search(question(recipe("stage2"), 8, "h200"))
    given = recipe("stage2", "--vision-parallel", "data", "--vision-micro-batch-size", "4")
    found = search(question(given, 8, "h200", fixed=(VISION_MICRO,)))
    best = found.plans[0].candidate.config
    assert found.plans[0].seconds_per_row == plain.plans[0].seconds_per_row and found.num_valid == plain.num_valid
    assert best.parallel.vision_parallel == "pipeline" and best.parallel.vision_micro_batch_size == 8


def test_tensor_parallelism_across_hosts_is_refused() -> None:
    config = recipe("stage2", "--tensor-model-parallel-size", "16", "--global-batch-samples", "4096")
    with pytest.raises(
        ConfigError,
        match="ranks 0 to 15 are not on one host: NVLink connects 8 GPUs, and",
    ):
        search(question(config, 32, fixed=(TENSOR,)))


@pytest.mark.parametrize(("flags", "fixed"), [(("--no-overlap-grad-reduce",), (REDUCE,)), ((), ())])
def test_an_exchange_that_is_not_hidden_is_planned_as_the_trainer_takes_it(
    flags: tuple[str, ...], fixed: tuple[str, ...]
) -> None:
    asked = question(recipe("stage2", *flags), 8, fixed=fixed)
    survey = Survey(asked)
    survey.look()
    assert survey.valid
    for one in survey.valid[::7]:
        validate(one.config, world_size=8, cuda=True)
        assert one.config.parallel.overlap_param_gather <= one.config.parallel.overlap_grad_reduce


def test_what_the_recipe_overlaps_rejects_no_family() -> None:
    """Stage 3 says ``overlap_param_gather``, which an optimizer on every rank does not have."""
    config = recipe("stage3", "--no-use-distributed-optimizer")
    asked = replace(question(config, 8, "b200", samples=3, fixed=(SHARDED,)), tolerance=0.2)
    survey = Survey(asked)
    survey.look()
    assert survey.valid and not any(one.config.parallel.overlap_param_gather for one in survey.valid)
    gathers = recipe("stage3", "--overlap-param-gather")
    survey = Survey(replace(question(gathers, 8, "b200", samples=3, fixed=(GATHER,)), tolerance=0.2))
    survey.look()
    assert survey.valid and all(one.config.parallel.use_distributed_optimizer for one in survey.valid)


def test_a_text_only_micro_batch_encodes_a_blank_image() -> None:
    """33 vision layers keep 59,392 bytes for each of 1,024 patches; four micro-batches are held on the first rank."""
    config = recipe(
        "stage2", "--pipeline-model-parallel-size", "4", "--micro-batch-size", "1", "--vision-parallel", "pipeline",
        "--tensor-model-parallel-size", "1", "--no-sequence-parallel",
    )  # fmt: skip
    text, one = make_row(config, images=0, samples=4), make_row(config, images=1, samples=4)
    assert text.computed(config).num_images == 1 and text.work(1).num_images == 0
    asked = [Question(config, row, find_gpu("h100"), 16) for row in (text, one)]
    memory = [describe(each, config).memory[0].activations for each in asked]
    assert memory[0] == memory[1] > 4 * 33 * 1024 * 59392
    whole = replace(config, parallel=replace(config.parallel, vision_parallel="data"))
    assert text.computed(whole).num_images == 0


@pytest.mark.parametrize(
    ("images", "samples", "unpacked", "said"),
    [
        (float("nan"), 1.0, False, "expected numbers"),
        (1.0, float("inf"), False, "expected numbers"),
        (7.93, 8.0, False, "cannot hold 7.93 images"),
        (1.0, 5.5, True, "each row has one sample"),
    ],
)
def test_rows_that_cannot_be(images: float, samples: float, unpacked: bool, said: str) -> None:
    config = recipe("stage2")
    config = replace(config, data=replace(config.data, unpacked=unpacked))
    with pytest.raises(ConfigError, match=said):
        make_row(config, images=images, samples=samples)
