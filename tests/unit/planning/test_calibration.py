"""The factors that a profile gives make the calculated times of its stages the measured ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.calibration import calibrate, check_profile_is_of, describe
from megatron_vl.planning.flops import Work
from megatron_vl.planning.gpus import GPUS, Gpu, PartFactors, Slowness, read_rates
from megatron_vl.planning.layout import resolve_layout, vision_part
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.rows import Row
from megatron_vl.planning.stage_profile import MicroBatchTimes, StageProfile, VisionTimes
from megatron_vl.planning.step_time import stage_costs, step_time
from megatron_vl.planning.vision_share import VisionShare

ROOT = Path(__file__).resolve().parents[3]
H100 = replace(GPUS["h100"], host_seconds=1e-9)
"""The launches of its CPU never limit a pass, so times are sums."""
TRUE = PartFactors(Slowness(2.0, 3.0), Slowness(1.5, 1.25), Slowness(4.0, 0.75))
ALIKE = PartFactors(*3 * [Slowness(2.0, 3.0)])


def config_of(*flags: str) -> RunConfig:
    recipe = ROOT / "examples" / "qwen_vl" / "stage2_multitask.yaml"
    config = load_config(recipe, ["--tensor-model-parallel-size", "1", "--no-sequence-parallel", *flags])
    training = replace(config.training, global_batch_size=64, global_batch_samples=None)
    return replace(config, training=training)


def profile_of(
    config: RunConfig, factors: PartFactors, images: Sequence[int], *, gpu: Gpu = H100, ranks: int = 8
) -> StageProfile:
    """What a profile would hold if the parts took ``factors`` times as long as the rates of the GPU say."""
    layout, rows = Layout.of(config, resolve_layout(config)), []
    for number in images:
        row = MicroBatchTimes(11, 0, number, 8000, 8000.0**2 / 4, 4000, (), ())
        costs = stage_costs(config, layout, row.work, factors)
        forward = tuple(cost.forward.seconds(gpu) for cost in costs)
        backward = tuple(cost.backward.seconds(gpu) for cost in costs)
        rows.append(replace(row, forward=forward, backward=backward))
    return StageProfile("made up", ranks, (0,), config, tuple(rows))


def flat(factors: PartFactors) -> list[float]:
    return [value for part in asdict(factors).values() for value in part.values()]


def test_the_factors_of_all_parts_are_found_from_four_stages() -> None:
    """Stages of the vision part alone, of layers alone and of layers with the head: one stage for each unknown."""
    config = config_of("--pipeline-model-parallel-size", "4", "--micro-batch-size", "8")
    found = calibrate(profile_of(config, TRUE, [8, 30, 1, 12]), H100)
    assert flat(found.factors) == pytest.approx(flat(TRUE), rel=1e-5)
    assert [stage.name for stage in found.stages][0] == "stage 0 (V*33)"


def test_where_the_cpu_limits_every_pass_its_launches_are_compared() -> None:
    config, slow = config_of("--pipeline-model-parallel-size", "4"), replace(H100, host_seconds=1.0)
    found = calibrate(profile_of(config, TRUE, [1, 5, 3], gpu=slow), slow)
    assert flat(found.factors) == pytest.approx(flat(TRUE), rel=1e-5)
    assert found.stages[0].calculated.forward == pytest.approx(33 / 3)


@pytest.mark.parametrize("images", [[4, 4], [1, 2, 5]])
def test_parts_that_are_alike_have_one_factor_in_one_stage(images: list[int]) -> None:
    config = config_of("--micro-batch-size", "8")
    found = calibrate(profile_of(config, ALIKE, images), H100)
    assert flat(found.factors) == pytest.approx(flat(ALIKE), rel=1e-3)


def test_micro_batches_with_more_images_tell_the_vision_part_from_the_rest_of_one_stage() -> None:
    config = config_of("--micro-batch-size", "8")
    found = calibrate(profile_of(config, TRUE, [2, 40, 20, 10]), H100)
    assert found.factors.vision.forward == pytest.approx(2.0, rel=0.02)
    assert found.factors.vision.backward == pytest.approx(3.0, rel=0.02)
    assert found.factors.language.forward < found.factors.vision.forward


@pytest.mark.parametrize("flags", [
    (), ("--pipeline-model-parallel-size", "2"), ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ("--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"),
])  # fmt: skip
def test_a_plan_of_the_profiled_layout_has_the_measured_times(flags: tuple[str, ...]) -> None:
    config = config_of("--micro-batch-size", "4", *flags)
    profile = profile_of(config, TRUE, [16, 30, 1, 22], gpu=H100)
    found = calibrate(profile, H100)
    mean = sum((row.work for row in profile.micro_batches), Work())
    share = 1 / len(profile.micro_batches) / config.training.micro_batch_size
    row = Row(*(share * value for value in (mean.num_images, 1, mean.num_tokens, mean.sum_squared_spans)), 0, "")
    row = replace(row, supervised=share * mean.num_supervised)
    gpu = replace(H100, factors=found.factors)
    planned = step_time(config, Layout.of(config, resolve_layout(config)), row, gpu, 8).stages
    for number, (stage, check) in enumerate(zip(planned, found.stages, strict=True)):
        forward = sum(one.forward[number] for one in profile.micro_batches) / 4
        backward = sum(one.backward[number] for one in profile.micro_batches) / 4
        assert (stage.forward, stage.backward) == pytest.approx((forward, backward), rel=1e-4)
        assert check.measured == Slowness(pytest.approx(forward), pytest.approx(backward))
        assert check.fitted == Slowness(pytest.approx(forward, rel=1e-4), pytest.approx(backward, rel=1e-4))
        assert check.calculated.forward < 0.8 * forward


def test_noise_makes_no_part_free_of_cost() -> None:
    """A micro-batch without images that took longest would give the vision part a time below zero."""
    config = config_of("--micro-batch-size", "8")
    profile = profile_of(config, ALIKE, [1, 20])
    text, images = profile.micro_batches
    swapped = (replace(text, forward=images.forward), replace(images, forward=text.forward))
    found = calibrate(replace(profile, micro_batches=swapped), H100)
    assert all(0.2 < factor < 20 for factor in flat(found.factors))
    (stage,) = found.stages
    assert stage.fitted.forward == pytest.approx(stage.measured.forward, rel=1e-3)


@pytest.mark.parametrize("recompute", ["--vision-recompute", "--no-vision-recompute"])
def test_the_vision_part_of_every_rank_has_its_own_times(recompute: str) -> None:
    config = config_of("--vision-parallel", "data", "--pipeline-model-parallel-size", "2", recompute)
    profile = profile_of(config, TRUE, [3, 5, 4, 4], ranks=2)
    layout = Layout.of(config, resolve_layout(config))
    share = VisionShare(config, 24, 48, layout.everywhere)
    gpu = replace(H100, factors=TRUE)
    cost = share.units.stage(vision_part(config.model), trained=share.trained, factors=TRUE)
    forward = 3 * cost.forward.seconds(gpu)  # 24 images, 8 at a time
    backward = 3 * cost.backward.seconds(gpu) + (forward if recompute == "--vision-recompute" else 0.0)
    profile = replace(profile, vision=tuple(VisionTimes(11, rank, 24, forward, backward) for rank in (0, 1)))
    found = calibrate(profile, H100)
    assert found.factors.vision == Slowness(pytest.approx(2.0, rel=1e-3), pytest.approx(3.0, rel=1e-3))
    assert share.seconds(replace(H100, factors=found.factors)) == pytest.approx(forward + backward, rel=1e-3)
    assert found.stages[-1].name == "vision part on every rank"


def test_a_frozen_tower_has_no_backward_pass_to_compare() -> None:
    config = config_of("--pipeline-model-parallel-size", "4", "--micro-batch-size", "8", "--freeze-vision")
    found = calibrate(profile_of(config, ALIKE, [8, 30]), H100)
    assert flat(found.factors) == pytest.approx(flat(ALIKE), rel=1e-3)


def test_what_was_taken_is_said() -> None:
    config = config_of("--pipeline-model-parallel-size", "4", "--micro-batch-size", "8")
    profile = profile_of(config, TRUE, [8, 30, 1, 12])
    lines = describe(profile, calibrate(profile, H100), config.model)
    assert lines[0] == "profile: steps 11 to 11 on 8 x made up, 4 micro-batches"
    assert (
        "vision part 2 forward, 3 backward; language layers 1.5 forward, 1.25 backward; head 4 forward, 0.75"
        in lines[1]
    )
    assert len(lines) == 2 + 4 + 1 and "rank 0 wrote a trace meanwhile" in lines[-1]


def test_another_model_is_named_in_a_line() -> None:
    profile = profile_of(config_of("--micro-batch-size", "8"), TRUE, [8, 30])
    found = calibrate(profile, H100)
    deeper = config_of("--num-layers", "40", "--image-size", "224").model
    (line,) = [line for line in describe(profile, found, deeper) if "another model" in line]
    assert line.strip() == (
        "the profile is of another model than the plan: image_size 448 (the plan: 224), "
        "language.num_layers 32 (the plan: 40)"
    )
    tiny = replace(deeper, preset="tiny", vision=replace(deeper.vision, num_layers=4, hidden_size=64, patch_size=7))
    (line,) = [line for line in describe(profile, found, tiny) if "another model" in line]
    assert "preset qwen_vl_7b (the plan: tiny)" in line and line.endswith(
        "vision.hidden_size 1664 (the plan: 64) and 2 more"
    )


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
    ],
)
def test_a_profile_is_of_the_gpu_that_its_device_names(device: str, gpu: str) -> None:
    config = config_of()
    profile = replace(profile_of(config, TRUE, [4]), device=device)
    check_profile_is_of(profile, GPUS[gpu], config)
    for other in GPUS.keys() - {gpu}:
        with pytest.raises(ConfigError, match=rf"{device}' says nothing about --gpu {other}; plan with --gpu {gpu}, "):
            check_profile_is_of(profile, GPUS[other], config)


@pytest.mark.parametrize(
    ("device", "measured", "planned", "said"),
    [
        ("CPU", (), (), r"a profile of a CPU says nothing about --gpu h100; profile a run on that GPU"),
        ("NVIDIA L40S", (), (), r"a profile of 'NVIDIA L40S' says nothing about --gpu h100; profile a run"),
        ("NVIDIA H100 PCIe", ("--no-bf16",), (), r"a profile in fp32 says nothing about a plan in bf16; give both"),
        (
            "NVIDIA H100 PCIe",
            (),
            ("--fp8-format", "hybrid"),
            r"in bf16 says .* plan in bf16 with FP8 \(hybrid, tensorw",
        ),
    ],
)
def test_a_profile_of_something_else_is_refused(
    device: str, measured: tuple[str, ...], planned: tuple[str, ...], said: str
) -> None:
    profile = replace(profile_of(config_of(), TRUE, [4]), device=device, config=config_of(*measured))
    with pytest.raises(ConfigError, match=said):
        check_profile_is_of(profile, GPUS["h100"], config_of(*planned))


def test_a_profile_of_no_rank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    profile = asdict(profile_of(config_of(), TRUE, [4])) | {"world_size": 0}
    path.write_text(json.dumps({"stage_times": profile}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"world_size"):
        read_rates(path)


def test_the_file_is_read_back(tmp_path: Path) -> None:
    profile = profile_of(config_of("--pipeline-model-parallel-size", "2"), TRUE, [4, 0])
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"stage_times": asdict(profile), "nvlink_gb_per_s": 300}), encoding="utf-8")
    rates = read_rates(path)
    assert rates.stage_times == profile and rates.nvlink_gb_per_s == 300


def test_a_profile_that_cannot_be_is_refused() -> None:
    config = config_of("--pipeline-model-parallel-size", "2")
    profile = profile_of(config, TRUE, [4])
    (row,) = profile.micro_batches
    with pytest.raises(ConfigError, match=r"has 1 forward and 2 backward times, expected one for each of the 2 stages"):
        calibrate(replace(profile, micro_batches=(replace(row, forward=(1.0,)),)), H100)
    with pytest.raises(ConfigError, match=r"micro_batches is empty"):
        calibrate(replace(profile, micro_batches=()), H100)
    split = config_of("--tensor-model-parallel-size", "8", "--sequence-parallel")
    short = profile_of(split, TRUE, [4])
    (row,) = short.micro_batches
    with pytest.raises(ConfigError, match=r"stage 0 \(V\*48RL\*32\) took 1e-06 s forward, but its collectives"):
        calibrate(replace(short, micro_batches=(replace(row, forward=(1e-6,)),)), H100)
