"""Memory, time and traffic of a vision part that every rank holds, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping
from megatron_vl.planning.flops import Work
from megatron_vl.planning.gpus import GPUS, MeasuredRates, with_rates
from megatron_vl.planning.layout import resolve_layout, vision_part
from megatron_vl.planning.memory import Layout, rank_memories, schedule_memories, state_bytes
from megatron_vl.planning.rows import Row
from megatron_vl.planning.stage_cost import UnitCosts
from megatron_vl.planning.step_time import fastest_possible, step_time
from megatron_vl.planning.vision_share import VisionShare

ROOT = Path(__file__).resolve().parents[3]
H100 = GPUS["h100"]
ROW = Row(images=4, samples=4, tokens=2048, sum_squared_spans=2048**2, supervised=1016, source="")
VISION = 1_842_753_536 + 91_802_624
"""Parameters of the vision tower and of the resampler."""


def recipe(stage: str, *flags: str, rows: int = 16) -> RunConfig:
    found = next((ROOT / "examples" / "qwen_vl").glob(f"{stage}_*.yaml"))
    config = load_config(found, ["--vision-parallel", "data", "--pipeline-model-parallel-size", "2", *flags])
    training = replace(config.training, global_batch_size=rows, global_batch_samples=None)
    return replace(config, training=training)


def layout_of(config: RunConfig) -> Layout:
    return Layout.of(config, resolve_layout(config))


def test_every_rank_holds_the_vision_part_and_a_share_of_its_optimizer() -> None:
    config = recipe("stage2")
    layout = layout_of(config)
    assert layout.everywhere == pytest.approx(VISION, rel=1e-3)
    language = layout.ranks[0].trained - layout.everywhere
    assert layout.trained[0] == language
    state = state_bytes(config, layout.ranks[0], 4, everywhere=layout.everywhere)  # 16 ranks = 2 x 2 x 4
    assert state["gradients"] == 4 * layout.ranks[0].trained
    assert state["moments"] == pytest.approx(8 * (language / 4 + layout.everywhere / 16))
    frozen = layout_of(recipe("stage3"))
    assert frozen.everywhere == pytest.approx(91.8e6, rel=2e-3)


def test_the_share_of_a_rank() -> None:
    config = recipe("stage2")
    share = VisionShare.of(config, ROW.work(1), 8, 0.0)
    assert share is not None
    assert (share.all_images, share.images) == (32, 8)
    assert share.feature_bytes == 32 * 256 * 4096 * 2 and share.kept_bytes == 0 and share.recomputes
    kept = VisionShare.of(recipe("stage2", "--no-vision-recompute"), ROW.work(1), 8, 0.0)
    assert kept is not None and kept.kept_bytes == pytest.approx(8 * 2.97e9, rel=0.02)
    assert VisionShare.of(recipe("stage2", "--vision-parallel", "pipeline"), ROW.work(1), 8, 0.0) is None


def test_the_time_of_a_share_is_two_forward_passes_and_a_backward_pass() -> None:
    config = recipe("stage2")
    share = VisionShare.of(config, ROW.work(1), 16, 0.0)  # 16 images, 8 at a time
    assert share is not None
    cost = UnitCosts.of(config, Work(num_images=8), Keeping("transformer_engine")).stage(
        vision_part(config.model), trained=0
    )
    expected = 2 * (2 * cost.forward.seconds(H100) + cost.backward.seconds(H100))
    assert share.seconds(H100) == pytest.approx(expected)
    frozen = VisionShare.of(recipe("stage3"), ROW.work(1), 16, 0.0)
    assert frozen is not None and not frozen.recomputes
    assert frozen.seconds(H100) < expected / 3


def test_images_that_are_encoded_together_are_full_parts_and_a_rest() -> None:
    """The trainer cuts 20 images into 16 and 4, and not into 10 and 10."""
    config = recipe("stage2", "--vision-micro-batch-size", "16")
    twenty, sixteen, four = (VisionShare(config, number, 4 * number, 0.0) for number in (20, 16, 4))
    assert twenty.backward_bytes == sixteen.backward_bytes
    assert twenty.seconds(H100) == pytest.approx(sixteen.seconds(H100) + four.seconds(H100))
    # The CPU launches 48 layers and the resampler, 5 ms each, with a third of it for each of two forward passes.
    assert four.seconds(H100) == pytest.approx(49 * 5e-3 * 4 / 3)
    at_once = replace(H100, host_seconds=0.0)
    assert four.launch_seconds(H100) == pytest.approx(four.seconds(H100) - four.seconds(at_once))
    assert sixteen.launch_seconds(H100) == 0 and sixteen.seconds(H100) > four.seconds(H100)
    assert VisionShare(config, 0.0, 0.0, 0.0).seconds(H100) == 0


def test_features_go_to_the_first_stage_and_gradients_return() -> None:
    share = VisionShare.of(recipe("stage2"), ROW.work(1), 8, 0.0)
    assert share is not None
    features = 32 * 256 * 4096 * 2
    there, back = features * 3 / 4, features / 4  # from three of four ranks; to one of the two on the other stage
    assert share.exchanged_bytes == (there, back)
    # On another host: two shares come over the network and one over NVLink meanwhile, and one goes back.
    assert share.exchange_seconds(H100, far_stages=1) == pytest.approx((features / 2 + back) / 36.5e9 + 2 * 210e-6)
    assert share.exchange_seconds(H100, far_stages=0) == pytest.approx((there + back) / 360e9 + 2 * 40e-6)
    # A rank sends its share to the other of the first stage, or to both of them, and gradients from there.
    assert [share.sent_bytes(*pair) for pair in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        features / 4, features / 2, features / 4, 0,
    ]  # fmt: skip


def test_features_and_the_backward_pass_need_memory() -> None:
    config = recipe("stage2")
    layout = layout_of(config)
    first, second = rank_memories(config, layout, ROW.work(1), world_size=4, micro_batches=16)
    assert first.communication - second.communication == 64 * 256 * 4096 * 2
    assert first.activations == pytest.approx(8 * 2.97e9, rel=0.02) and first.logits == 0
    full = recipe("stage2", "--recompute-granularity", "full")
    same, _ = rank_memories(full, layout_of(full), ROW.work(1), world_size=4, micro_batches=16)
    assert same.activations == first.activations, "images are encoded again as a whole, not layer by layer"
    fewer = recipe("stage2", "--vision-micro-batch-size", "2", "--recompute-granularity", "full")
    less, _ = rank_memories(fewer, layout_of(fewer), ROW.work(1), world_size=4, micro_batches=16)
    assert less.total < first.total - 15e9


def test_parts_of_a_step_add_up() -> None:
    config = recipe("stage2")
    layout = layout_of(config)
    found = step_time(config, layout, ROW, H100, 16)
    assert found.seconds == pytest.approx(
        found.busiest + found.bubble + found.vision + found.exposed_data + found.optimizer
    )
    assert found.exposed_data > layout.everywhere * 6 * 7 / 8 / 360e9  # nothing hides the exchange over all ranks
    assert fastest_possible(config, layout, ROW, H100, 16) <= found.seconds
    # Four micro-batches go to the other host, and once the features of a fourth of 16 images come to both first ranks.
    features = 16 * 256 * 4096 * 2
    assert found.traffic.pipeline_network == 4 * 1024 * 4096 * 2 + features / 2
    assert found.traffic.pipeline_nvlink == features / 4


@pytest.mark.parametrize(
    ("milliseconds", "again", "in_windows"),
    [(5.0, {8: 2.61, 16: 1.68}, {1: 5.88, 2: 2.94, 3: 1.96, 12: 1.26}), (1.0, {8: 1.70, 16: 1.68}, {1: 1.37, 2: 1.31})],
)
def test_the_table_of_windows_in_the_documentation(
    milliseconds: float, again: dict[int, float], in_windows: dict[int, float]
) -> None:
    """docs/scale.md: 240 images of a step on four ranks, in 24 micro-batches; two windows are kept at a time."""
    gpu = with_rates(H100, MeasuredRates(host_ms_per_layer=milliseconds))
    config = recipe("stage2", "--micro-batch-size", "2")
    trained = layout_of(config).everywhere
    for size, seconds in again.items():
        own = replace(config, parallel=replace(config.parallel, vision_micro_batch_size=size))
        assert VisionShare(own, 60, 240, trained).seconds(gpu) == pytest.approx(seconds, abs=0.006)
    layers = replace(config.parallel, vision_recompute_granularity="layers", vision_micro_batch_size=32)
    by_layers = VisionShare(replace(config, parallel=layers), 60, 240, trained)
    assert by_layers.seconds(gpu) == pytest.approx(1.66, abs=0.006)
    assert by_layers.kept_bytes == pytest.approx(60 * 0.22e9, rel=0.01)
    kept = replace(config.parallel, vision_recompute=False, vision_micro_batch_size=100)
    for width, seconds in in_windows.items():
        window = VisionShare(replace(config, parallel=kept), 2.5 * width, 10 * width, trained)
        assert 24 / width * window.seconds(gpu) == pytest.approx(seconds, abs=0.006)
        assert window.kept_bytes == pytest.approx(2.5 * width * 2.98e9, rel=2e-3)


def test_the_memory_of_windows_in_the_documentation() -> None:
    """docs/scale.md: 35.1 GB without images, 50.3 and 74.3 with what is encoded again."""
    row = replace(ROW, images=5, samples=5.5, supervised=2048 - 5 * 258)
    config = recipe("stage2", "--micro-batch-size", "2", rows=768)
    for size, total in ((8, 50.3), (16, 74.3)):
        own = replace(config, parallel=replace(config.parallel, vision_micro_batch_size=size))
        memory = rank_memories(own, layout_of(own), row.work(2), world_size=64, micro_batches=24)
        assert memory[0].total / 1e9 == pytest.approx(total, abs=0.06)
    layers = replace(config.parallel, vision_recompute_granularity="layers", vision_micro_batch_size=32)
    own = replace(config, parallel=layers)
    memory = rank_memories(own, layout_of(own), row.work(2), world_size=64, micro_batches=24)
    assert memory[0].total / 1e9 == pytest.approx(48.9, abs=0.06)
    plain = schedule_memories(config, layout_of(config), row.work(2), data_parallel=16, micro_batches=24)
    assert plain[0].total / 1e9 == pytest.approx(35.1, abs=0.06)
