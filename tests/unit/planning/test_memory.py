"""The memory of ranks: exact counts, the published formula, and what an H200 needed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import parse_layout, resolve_layout
from megatron_vl.planning.memory import Layout, RankMemory, checkpoint_host_bytes, rank_memories, state_bytes

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
ROW = Work(num_images=4, num_tokens=2048, sum_squared_spans=2048**2, num_supervised=1016)


def recipe(stage: str, *flags: str) -> RunConfig:
    found = next((ROOT / "examples" / "qwen_vl").glob(f"{stage}_*.yaml"))
    return load_config(found, ["--tensor-model-parallel-size", "1", "--no-sequence-parallel", *flags])


def memories(config: RunConfig, work: Work, *, world_size: int, micro_batches: int = 16) -> tuple[RankMemory, ...]:
    layout = Layout.of(config, resolve_layout(config))
    return rank_memories(config, layout, work, world_size=world_size, micro_batches=micro_batches)


@pytest.mark.parametrize(
    ("stage", "data_parallel", "gigabytes"),
    [("stage1", 8, 30.0), ("stage1", 64, 27.4), ("stage2", 8, 72.4), ("stage2", 64, 59.7), ("stage3", 8, 62.3),
     ("stage3", 64, 52.0)],
)  # fmt: skip
def test_state_of_the_three_stages(stage: str, data_parallel: int, gigabytes: float) -> None:
    """6 + 12 / d bytes for a parameter that trains and 2 for one that does not, as Megatron-LM's documentation says."""
    config = recipe(stage)
    layout = Layout.of(config, resolve_layout(config))
    state = state_bytes(config, layout.ranks[0], data_parallel)
    assert sum(state.values()) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_state_is_exact_for_every_kind_of_optimizer() -> None:
    config = recipe("stage1", "--pipeline-model-parallel-size", "2")
    for rank in Layout.of(config, resolve_layout(config)).ranks:
        trained, frozen = rank.trained, rank.frozen
        assert state_bytes(config, rank, 4) == {
            "weights": 2 * (trained + frozen), "gradients": 4 * trained, "masters": trained, "moments": 2 * trained,
        }  # fmt: skip
        whole = replace(config, parallel=replace(config.parallel, use_distributed_optimizer=False))
        assert state_bytes(whole, rank, 4)["moments"] == 8 * trained
        fp32 = replace(config, training=replace(config.training, bf16=False))
        assert state_bytes(fp32, rank, 1) == {
            "weights": 4 * (trained + frozen), "gradients": 4 * trained, "masters": 0, "moments": 8 * trained,
        }  # fmt: skip


def test_weights_in_fp8_are_held_twice_more_and_saved_once() -> None:
    """4 h^2 + 3 h ffn of each of 32 language layers, and 4 w^2 + 2 w ffn of each of 48 vision layers, over 2 ranks."""
    language, vision = 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2, 48 * (4 * 1664**2 + 2 * 1664 * 8192) // 2
    flags = ["--tensor-model-parallel-size", "2", "--fp8-format", "hybrid"]
    for more, quantized in (
        ([], language),
        (["--fp8-parts", "both"], language + vision),
        (["--fp8-parts", "both", "--vision-parallel", "data"], language + 2 * vision),
        (["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "3"], language * 28 // 32),
    ):
        config = recipe("stage2", *flags, *more)
        plain = replace(config, training=replace(config.training, fp8_format=None))
        layout, without = (Layout.of(one, resolve_layout(one)) for one in (config, plain))
        assert (layout.ranks[0].quantized, without.ranks[0].quantized) == (quantized, 0)
        held, usual = state_bytes(config, layout.ranks[0], 1), state_bytes(plain, without.ranks[0], 1)
        assert held == usual | {"weights": usual["weights"] + 2 * quantized}
        assert checkpoint_host_bytes(config, layout, 1) == checkpoint_host_bytes(plain, without, 1)


def test_ranks_of_a_pipeline_hold_fewer_and_fewer_micro_batches() -> None:
    flags = ("--pipeline-model-parallel-size", "4", "--pipeline-layout", "V*48RL*8|L*8|L*8|L*8")
    long = memories(recipe("stage2", *flags), ROW, world_size=4)
    assert [round(one.activations / long[3].activations, 1) for one in long[1:]] == [3.0, 2.0, 1.0]
    few = memories(recipe("stage2", *flags), ROW, world_size=4, micro_batches=2)
    assert few[1].activations == few[2].activations
    assert long[0].logits == 0 and long[3].logits == 1016 * 151936 * 6


def test_messages_and_gathered_inputs() -> None:
    flags = ("--pipeline-model-parallel-size", "2", "--pipeline-layout", "V*48RL*7|L*25")
    first, second = memories(recipe("stage2", *flags), ROW, world_size=2)
    assert first.communication == second.communication == 2 * 2048 * 4096 * 2
    virtual = (*flags[:2], "--virtual-pipeline-model-parallel-size", "2", "--pipeline-layout", "V*24|V*24|RL*16|L*16")
    first, second = memories(recipe("stage2", *virtual), ROW, world_size=2)
    assert first.communication == 4 * 2048 * 4096 * 2  # tokens go to rank 1; patches, 4 x 1024 x 1664 x 2, are less
    split = load_config(ROOT / "examples" / "qwen_vl" / "stage2_multitask.yaml", [])
    assert memories(split, ROW, world_size=2)[0].communication == 2 * 2048 * 4096 * 2


def test_the_total_is_the_sum_of_its_parts() -> None:
    (one,) = memories(recipe("stage2"), ROW, world_size=8)
    assert one.total == sum(getattr(one, item.name) for item in fields(one))
    assert one.optimizer == one.masters + one.moments


def test_host_memory_of_a_save() -> None:
    config = recipe("stage2")
    layout = Layout.of(config, resolve_layout(config))
    trained = layout.ranks[0].trained
    assert checkpoint_host_bytes(config, layout, 8) == pytest.approx(trained * (12 / 8 + 2))


def test_layout_counts_each_stage() -> None:
    config = recipe("stage2", "--pipeline-model-parallel-size", "2")
    stages = parse_layout("V*48R|L*32", model=config.model, pipeline_size=2)
    layout = Layout.of(config, stages)
    assert sum(layout.trained) == 9_655_886_592


@pytest.mark.parametrize(
    ("stage", "layers", "rows", "image_and_labels", "measured"),
    [
        ("stage2", (12, 8), 1, (5, 680), 65.326),
        ("stage2", (12, 8), 2, (5, 680), 71.655),
        ("stage2", (12, 8), 4, (5, 680), 84.313),
        ("stage1", (48, 32), 1, (6, 396), 57.277),
        ("stage1", (48, 32), 2, (6, 396), 67.569),
        ("text", (1, 32), 1, (1, 2047), 133.62),
        ("text", (1, 32), 2, (0.5, 2047), 135.92),
    ],
)
def test_peaks_of_an_h200(
    stage: str, layers: tuple[int, int], rows: int, image_and_labels: tuple[float, int], measured: float
) -> None:
    """The peaks in GiB of docs/results/gpu.json, with Transformer Engine; text alone is recomputed."""
    flags = ["--vision-num-layers", str(layers[0]), "--num-layers", str(layers[1]), "--micro-batch-size", str(rows)]
    if stage == "text":
        flags += ["--freeze-vision", "--freeze-resampler", "--recompute-granularity", "full"]
    config = recipe("stage2" if stage == "text" else stage, *flags)
    images, labels = image_and_labels
    work = Work(num_images=rows * images, num_tokens=rows * 2048, num_supervised=rows * labels)
    (one,) = memories(config, work, world_size=1)
    assert one.total / GIB == pytest.approx(measured, rel=0.01)
