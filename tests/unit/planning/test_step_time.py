"""Times and traffic that can be calculated by hand, and what an H200 measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.batch import data_parallel_size, num_microbatches
from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping
from megatron_vl.planning.flops import Work
from megatron_vl.planning.gpus import GPUS, Gpu, Link, MeasuredRates, find_gpu, with_rates
from megatron_vl.planning.layout import PipelineLayout, resolve_layout
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.rows import Row
from megatron_vl.planning.stage_cost import PassCost, StageCost, UnitCosts
from megatron_vl.planning.step_time import StepTime, fastest_possible, step_time
from megatron_vl.planning.traffic import DataGroup, data_traffic

ROOT = Path(__file__).resolve().parents[3]
ROW = Row(images=4, samples=4, tokens=2048, sum_squared_spans=4 * 512**2, supervised=2048, source="")
PLAIN = ("--tensor-model-parallel-size", "1", "--no-sequence-parallel")
H100 = GPUS["h100"]


def recipe(stage: str, *flags: str, rows: int = 64) -> RunConfig:
    found = next((ROOT / "examples" / "qwen_vl").glob(f"{stage}_*.yaml"))
    config = load_config(found, [*PLAIN, "--no-overlap-grad-reduce", "--no-overlap-param-gather", *flags])
    training = replace(config.training, global_batch_size=rows, global_batch_samples=None)
    return replace(config, training=training)


def timed(config: RunConfig, gpu: Gpu = H100, *, world_size: int = 1, row: Row = ROW) -> StepTime:
    return step_time(config, Layout.of(config, resolve_layout(config)), row, gpu, world_size)


def whole_model(config: RunConfig, keeping: Keeping, work: Work) -> StageCost:
    (stage,) = PipelineLayout.whole(config.model).stages
    return UnitCosts.of(config, work, keeping).stage(stage, trained=0)


FUSED = Keeping("transformer_engine")


@pytest.mark.parametrize(("stage", "tera"), [("stage1", 71.1), ("stage2", 138.7), ("stage3", 105.8)])
def test_operations_of_a_row(stage: str, tera: float) -> None:
    cost = whole_model(recipe(stage), FUSED, ROW.work(1))
    both = cost.forward + cost.backward
    assert (both.products + both.attention) / 1e12 == pytest.approx(tera, abs=0.06)


def test_recomputation_computes_the_layers_once_more() -> None:
    config = recipe("stage2")
    plain = whole_model(config, FUSED, ROW.work(1))
    full = whole_model(config, replace(FUSED, recompute="full"), ROW.work(1))
    selective = whole_model(config, replace(FUSED, recompute="selective"), ROW.work(1))
    layers = 4 * 4.106e12 + 26.53e12 + 0.275e12
    again = full.backward.products + full.backward.attention - plain.backward.products - plain.backward.attention
    assert again == pytest.approx(layers, rel=2e-3)
    assert full.backward.launches - plain.backward.launches == pytest.approx(80 / 3)
    core = 4 * 48 * 4 * 1024**2 * 1664 + 32 * 2 * 4 * 512**2 * 4096
    assert selective.backward.attention - plain.backward.attention == core
    assert selective.backward.products == plain.backward.products


def test_tensor_parallel_traffic_of_a_row() -> None:
    """Ten collectives of 16.8 MB for each language layer under sequence parallelism, of which two are hidden."""
    config = recipe("stage2")
    (whole,) = PipelineLayout.whole(config.model).stages
    language = replace(
        whole, vision_layers=range(0), resampler=False, patch_embed=False, head=False, word_embedding=False
    )
    for tensor, gigabytes in ((2, 2.7), (4, 4.0), (8, 4.7)):
        keeping = replace(FUSED, tensor=tensor, sequence=True)
        cost = UnitCosts.of(config, ROW.work(1), keeping).stage(language, trained=0)
        both = cost.forward + cost.backward
        assert both.gathered / 1e9 == pytest.approx(gigabytes, abs=0.05)
        assert both.hidden == pytest.approx(both.gathered / 5)
        assert both.collectives == 32 * 8
    plain = UnitCosts.of(config, ROW.work(1), replace(FUSED, tensor=2)).stage(language, trained=0)
    assert plain.forward.gathered == plain.backward.gathered and plain.backward.hidden == 0


def test_tensor_parallel_traffic_between_layers() -> None:
    """By hand at tensor size 4: an all-gather brings 3/4 of its bytes to a rank, an all-reduce twice as much."""
    config, work = recipe("stage2"), Work(num_images=5, num_tokens=2048, num_supervised=700)
    tokens, patches, labels = 2048 * 4096 * 2, 5 * 1024 * 1664 * 2, 700
    units = UnitCosts.of(config, work, replace(FUSED, tensor=4, sequence=True))
    assert (
        units.word_embedding.forward.gathered == 1.5 * tokens
        and units.word_embedding.backward.gathered == 0.75 * tokens
    )
    assert units.patch_embed.forward.gathered == 0 and units.patch_embed.backward.gathered == 0.75 * patches
    assert units.resampler.forward.gathered == 0.75 * patches and units.resampler.backward.gathered == 0
    assert units.head.forward.gathered == 0.75 * tokens + 3 * 1.5 * 4 * labels and units.head.forward.collectives == 7
    assert units.head.backward.gathered == 1.5 * labels * 4096 * 2 and units.head.backward.collectives == 2
    plain = UnitCosts.of(config, work, replace(FUSED, tensor=4))
    assert plain.word_embedding.forward.gathered == 1.5 * tokens and plain.word_embedding.backward.gathered == 0
    assert plain.patch_embed.backward.gathered == plain.resampler.forward.gathered == 0
    assert plain.head.forward.gathered == 3 * 1.5 * 4 * labels
    alone = UnitCosts.of(config, work, FUSED)
    assert alone.word_embedding.forward.gathered == alone.head.forward.gathered == 0
    frozen = UnitCosts.of(recipe("stage3"), work, replace(FUSED, tensor=4, sequence=True))
    assert frozen.patch_embed.backward.gathered == 0 and frozen.resampler.forward.gathered == 0.75 * patches


def test_a_pass_takes_the_slower_of_gpu_and_cpu() -> None:
    gpu = Gpu("x", 1e9, 1e12, 1e12, 5e11, 1e12, Link(1e9, 1e-3), Link(1e9, 1e-3), host_seconds=3.0)
    cost = PassCost(products=2e12, attention=1e12, memory=1e12, gathered=3e9, hidden=1e9, collectives=4)
    assert cost.gpu_seconds(gpu) == pytest.approx(2 + 2 + 1 + 2 + 4e-3)
    assert cost.exposed_seconds(gpu) == pytest.approx(2.004)
    assert replace(cost, launches=2).seconds(gpu) == pytest.approx(7.004)
    assert replace(cost, launches=3).seconds(gpu) == pytest.approx(9.0)


def test_collectives_are_hidden_where_something_else_can_carry_them() -> None:
    cost = PassCost(products=794.5e12, gathered=3e9, hidden=1e9, collectives=2)
    gpu = replace(H100, nvlink=Link(1e9, 0.25))
    assert cost.gpu_seconds(gpu) == pytest.approx(1 + 2 + 2 * 0.25)
    assert cost.gpu_seconds(replace(gpu, overlaps=False)) == pytest.approx(1 + 3 + 2 * 0.25)


def test_data_parallel_traffic_of_the_whole_model() -> None:
    """50.7 GB over NVLink, and over the network 6.3 GB on 8 nodes; half of the bytes are those of the gradients."""
    config, parameters = recipe("stage2"), 9_655_886_592
    group = DataGroup((8,) * 8)
    traffic = data_traffic(config, parameters, H100, group)
    assert (traffic.reduce.nvlink + traffic.gather.nvlink) / 1e9 == pytest.approx(50.7, abs=0.05)
    assert (traffic.reduce.network + traffic.gather.network) / 1e9 == pytest.approx(6.34, abs=0.05)
    assert traffic.reduce.seconds + traffic.gather.seconds == pytest.approx(6.34 / 36.5, rel=0.02)
    whole = replace(config, parallel=replace(config.parallel, use_distributed_optimizer=False))
    reduced = data_traffic(whole, parameters, H100, group)
    assert reduced.reduce.nvlink == 2 * traffic.reduce.nvlink and reduced.gather.seconds == 0
    assert data_traffic(config, parameters, H100, DataGroup((1,))).reduce.seconds == 0


def test_overlap_hides_all_but_a_bucket() -> None:
    config = recipe("stage2")
    overlapped = replace(config, parallel=replace(config.parallel, overlap_grad_reduce=True, overlap_param_gather=True))
    group = DataGroup((8,) * 8)
    exposed = data_traffic(config, 9.6e9, H100, group).exposed(forward=1.0, backward=2.0, config=config)
    traffic = data_traffic(overlapped, 9.6e9, H100, group)
    assert traffic.buckets == 150
    hidden = traffic.exposed(forward=1.0, backward=2.0, config=overlapped)
    assert hidden == (traffic.reduce.seconds / 150, traffic.gather.seconds / 150)
    assert sum(hidden) < sum(exposed) / 100
    assert traffic.exposed(forward=0.0, backward=0.0, config=overlapped)[0] == traffic.reduce.seconds


def test_messages_of_replicas_that_hosts_divide() -> None:
    """Twelve GPUs as 1 x 3 x 4: ranks 0-2, 3-5, 6-8 and 9-11 are stages, and 8-11 are on the second host.

    Each stage sends its output to the next one, and as much back. Rank 8 of the third stage sends on to 11 on its host
    and back to 5 on the first host; rank 6 back to 3 there and on to 9; so no rank sends both over the network.
    """
    config = recipe("stage2", "--pipeline-model-parallel-size", "4", "--pipeline-layout", "V*48RL*2|L*10|L*10|L*10",
                    "--micro-batch-size", "1", rows=12)  # fmt: skip
    tokens = 2048 * 4096 * 2
    sent = timed(config, world_size=12).traffic
    assert sent.pipeline_network == 4 * tokens
    assert sent.pipeline_nvlink == 4 * 2 * tokens  # ranks 3 and 4
    assert timed(config, world_size=4).traffic.pipeline_network == 0
    stages = timed(config, world_size=12).stages
    over = H100.network.seconds(tokens)
    assert [stage.send for stage in stages] == pytest.approx([H100.nvlink.seconds(tokens), over, over, 0.0])


def test_a_step_of_one_gpu_is_its_micro_batches_and_the_optimizer() -> None:
    config = recipe("stage2", rows=4)
    found = timed(config)
    cost = UnitCosts.of(config, ROW.work(1), FUSED).stage(
        PipelineLayout.whole(config.model).stages[0], trained=9_655_886_592
    )
    micro_batch = cost.forward.seconds(H100) + cost.backward.seconds(H100)
    optimizer = 9_655_886_592 * 58 / (3350e9 * 0.9)
    assert found.busiest == pytest.approx(4 * micro_batch)
    assert (found.bubble, found.exposed_data, found.exposed_tensor) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    assert found.seconds == pytest.approx(4 * micro_batch + optimizer)
    assert found.required / 1e12 == pytest.approx(4 * 138.7, abs=0.2) and found.tokens == 4 * 2048


@pytest.mark.parametrize("flags", [
    (), ("--pipeline-model-parallel-size", "4"), ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ("--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"),
])  # fmt: skip
def test_parts_of_a_step_add_up_and_the_bound_is_below(flags: tuple[str, ...]) -> None:
    """The bound of a rank: all its passes, and one micro-batch through the stages before it."""
    config = recipe("stage2", *flags)
    layout = Layout.of(config, resolve_layout(config))
    found = step_time(config, layout, ROW, H100, 8)
    parts = found.busiest + found.bubble + found.vision + found.exposed_data + found.optimizer
    assert found.seconds == pytest.approx(parts)
    seconds = [own.forward + own.backward for own in found.stages]
    count, size = num_microbatches(config.training, data_parallel_size(config.parallel, 8)), len(found.timeline.ranks)
    bound = max(count * sum(seconds[rank::size]) + sum(seconds[:rank]) for rank in range(size))
    assert fastest_possible(config, layout, ROW, H100, 8) == pytest.approx(bound) and bound <= found.seconds
    assert found.launches <= found.busiest and found.exposed_tensor <= found.busiest


def test_operations_of_the_whole_recipe() -> None:
    """Stage 1 has 6.4 samples in a row here; stages 2 and 3 have one, as the paper counts."""
    for stage, samples, steps, row, expected in (
        ("stage1", 30720 / 6.4, 50_000, replace(ROW, images=6), 1.85e22),
        ("stage2", 4096, 19_000, ROW, 1.08e22),
        ("stage3", 128, 8_000, ROW, 1.08e20),
    ):
        config = recipe(stage, rows=round(samples))
        assert config.training.train_iters == steps
        assert steps * timed(config, row=row).required == pytest.approx(expected, rel=0.01)


# --- the H200 of docs/results/gpu.md --------------------------------------------------------------------------------

RATES = MeasuredRates(**json.loads((ROOT / "docs" / "results" / "h200_rates.json").read_text(encoding="utf-8")))
ROWS_OF_STAGE = {
    "stage1": Row(6, 6, 1944, 1944**2 / 6, 396, ""),
    "stage2": Row(5, 5, 2045, 2045**2, 680, ""),
    "text": Row(0, 1, 2048, 2048**2, 2047, ""),
}


def measured_step(stage: str, layers: tuple[int, int], rows: int) -> RunConfig:
    """The configuration of a measured step of four micro-batches; text alone was recomputed."""
    flags = ["--vision-num-layers", str(layers[0]), "--num-layers", str(layers[1]), "--micro-batch-size", str(rows)]
    if stage == "text":
        flags += ["--freeze-vision", "--freeze-resampler", "--recompute-granularity", "full"]
    return recipe("stage2" if stage == "text" else stage, *flags, rows=4 * rows)


@pytest.mark.parametrize(
    ("stage", "layers", "rows", "milliseconds", "errors"),
    [
        ("stage2", (12, 8), 1, 106.72, (0.03, 0.03)),
        ("stage2", (12, 8), 2, 157.65, (-0.20, -0.07)),
        ("stage2", (12, 8), 4, 310.92, (-0.21, -0.08)),
        ("stage1", (48, 32), 1, 412.75, (-0.01, -0.01)),
        ("stage1", (48, 32), 2, 380.74, (0.08, 0.08)),
        ("text", (1, 32), 1, 283.22, (-0.22, -0.22)),
        ("text", (1, 32), 2, 419.26, (-0.17, -0.04)),
    ],
)
def test_errors_of_the_times_are_those_of_the_documentation(
    stage: str, layers: tuple[int, int], rows: int, milliseconds: float, errors: tuple[float, float]
) -> None:
    """docs/scale.md has these errors: with published rates, and with those of the kernels of one step."""
    config = measured_step(stage, layers, rows)
    for gpu, error in zip((find_gpu("h200"), with_rates(find_gpu("h200"), RATES)), errors, strict=True):
        found = timed(config, gpu, row=ROWS_OF_STAGE[stage]).busiest / 4
        assert 1e3 * found / milliseconds - 1 == pytest.approx(error, abs=0.006)


def test_rates_of_the_h200_follow_from_its_profile() -> None:
    """Kernels of two micro-batches of four rows, in ms: operations or bytes over their time."""
    config = measured_step("stage2", (12, 8), 4)
    profile = {row["name"]: row["ours"] for row in json.loads((ROOT / "docs/results/gpu.json").read_text())}
    name = "stage2, transformer_engine, 12 + 8 layers, micro-batch 4: kernels of {}, ms of a step of 2"
    cost = whole_model(config, FUSED, ROWS_OF_STAGE["stage2"].work(4))
    layout = Layout.of(config, resolve_layout(config))
    both = cost.forward + cost.backward + PassCost(memory=8 * layout.trained[0])
    small = sum(profile[name.format(kind)] for kind in ("norm", "copies", "elementwise", "other"))
    assert RATES.matmul_tflops == pytest.approx(2 * both.products / profile[name.format("matmul")] / 1e9, rel=2e-3)
    assert RATES.attention_tflops == pytest.approx(
        2 * both.attention / profile[name.format("attention")] / 1e9, rel=2e-3
    )
    assert RATES.memory_gb_per_s == pytest.approx(2 * both.memory / small / 1e6, rel=2e-3)
