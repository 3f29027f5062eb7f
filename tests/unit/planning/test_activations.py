"""What layers keep: by hand, as real layers keep it, and as an H200 showed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_vl.model.build import build_model
from megatron_vl.planning.activations import (
    Keeping,
    LayerShape,
    boundary_bytes,
    chunk_bytes,
    embedding_working_bytes,
    head_working_bytes,
    layer_bytes,
    logits_bytes,
    working_bytes,
)
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import PipelineLayout, parse_layout
from tests.helpers.ranks import RankPools, Start

QWEN_VL = PRESETS["qwen_vl_7b"]
FUSED = Keeping("transformer_engine")
LANGUAGE, VISION = LayerShape.language(QWEN_VL), LayerShape.vision(QWEN_VL)
STATISTICS = 4 * 2 + 4 * 32
"""Bytes of two RMSNorms and the softmax of a language layer."""


@pytest.mark.parametrize(
    ("keeping", "trained", "expected"),
    [
        (FUSED, True, 16 * 4096 + 6 * 11008 + STATISTICS),
        (FUSED, False, 12 * 4096 + 4 * 11008 + STATISTICS),
        (replace(FUSED, kernels="local"), True, 20 * 4096 + 6 * 11008 + STATISTICS),
        (replace(FUSED, recompute="selective"), True, 16 * 4096 + 6 * 11008 + 8),
        (replace(FUSED, recompute="selective"), False, 10 * 4096 + 4 * 11008 + 8),
        (replace(FUSED, recompute="full"), True, 2 * 4096),
        (replace(FUSED, recompute="full", tensor=2), True, 2 * 4096),
        (replace(FUSED, recompute="full", tensor=2, sequence=True), True, 4096),
        (replace(FUSED, tensor=2, sequence=True), True, (16 * 4096 + 6 * 11008 + STATISTICS) / 2),
        (replace(FUSED, tensor=2), True, 8 * 4096 + 8 * 4096 / 2 + 6 * 11008 / 2 + 8 + 4 * 32 / 2),
        (replace(FUSED, element=4), True, 32 * 4096 + 12 * 11008 + STATISTICS),
    ],
)
def test_a_language_layer(keeping: Keeping, trained: bool, expected: float) -> None:
    assert layer_bytes(LANGUAGE, keeping, trained=trained) == pytest.approx(expected)


def test_a_vision_layer() -> None:
    expected = 16 * 1664 + 4 * 8192 + 16 + 4 * 16
    for name in ("transformer_engine", "local"):
        assert layer_bytes(VISION, replace(FUSED, kernels=name), trained=True) == expected


def test_frozen_vision_keeps_nothing() -> None:
    config = RunConfig(model=QWEN_VL, training=TrainingConfig(bf16=True, freeze_vision=True, freeze_resampler=True))
    stages = parse_layout("V*48R|L*32", model=QWEN_VL, pipeline_size=2).stages
    assert chunk_bytes(config, stages[0], Work(num_images=4), FUSED) == 0
    trained = replace(config, training=TrainingConfig(bf16=True))
    assert chunk_bytes(trained, stages[0], Work(num_images=4), FUSED) > 4 * 1024 * 48 * 59392


def test_what_stages_send() -> None:
    config = RunConfig(model=QWEN_VL, training=TrainingConfig(bf16=True, micro_batch_size=2))
    stages = parse_layout("V*24|V*24|R|L*16|L*16", model=QWEN_VL, pipeline_size=5).stages
    work = Work(num_images=10)
    patches, features, tokens = 10 * 1024 * 1664 * 2, 10 * 256 * 4096 * 2, 2 * 2048 * 4096 * 2
    sent = [boundary_bytes(config, stage, work, FUSED) for stage in stages[:4]]
    assert sent == [patches, patches, features, tokens]
    split = replace(FUSED, tensor=4, sequence=True)
    assert [boundary_bytes(config, stage, work, split) for stage in stages[:4]] == [
        patches / 4, patches / 4, features, tokens / 4,
    ]  # fmt: skip


def test_logits() -> None:
    config = RunConfig(model=QWEN_VL)
    assert logits_bytes(config, Work(num_supervised=2048), FUSED) == 2048 * 151936 * 6
    assert logits_bytes(config, Work(num_supervised=2048), replace(FUSED, tensor=2)) == 2048 * 152064 / 2 * 6
    in_place = logits_bytes(config, Work(num_supervised=2048), replace(FUSED, element=4))
    assert in_place == 2048 * 151936 * 4, "fp32 logits become the softmax"


def test_what_a_backward_pass_needs_besides() -> None:
    """By hand: the gradients that live at once, in bf16, of four rows."""
    config = RunConfig(model=QWEN_VL, training=TrainingConfig(bf16=True, micro_batch_size=4))
    vision, resampler, language = parse_layout("V*48|R|L*32", model=QWEN_VL, pipeline_size=3).stages
    work = Work(num_images=4, num_supervised=100)
    # Of the layer's output; and in the MLP of the activation's output and both halves, less the product's free input.
    most = 2 * 8192 * (4096 + 2 * 11008)
    assert working_bytes(config, language, work, FUSED) == most
    assert working_bytes(config, language, work, replace(FUSED, tensor=4, sequence=True)) == most / 4
    frozen = replace(config, training=replace(config.training, freeze_language_model=True))
    assert working_bytes(frozen, language, work, FUSED) == 2 * 8192 * (4096 + 3 * 11008), "no input was kept"
    # Of one row, the gradient of the second product's weight is more than that of another half.
    one = replace(config, training=replace(config.training, micro_batch_size=1))
    assert working_bytes(one, language, work, FUSED) == 2 * (2048 * (4096 + 11008) + 4096 * 11008)
    assert working_bytes(config, vision, Work(num_images=1), FUSED) == 2 * (1024 * (1664 + 8192) + 1664 * 8192)
    assert working_bytes(config, resampler, work, FUSED) == 2 * 4 * 1024 * 2 * 4096
    again = working_bytes(config, language, work, replace(FUSED, recompute="full"))
    assert again == most + 8192 * (16 * 4096 + 6 * 11008 + STATISTICS)
    assert head_working_bytes(config, work, FUSED) == 151936 * (100 * 6 + 4096 * 2)
    assert head_working_bytes(frozen, work, FUSED) == 151936 * 100 * 6


def test_the_gradient_of_the_word_embedding_comes_when_layers_are_free() -> None:
    config = RunConfig(model=QWEN_VL, training=TrainingConfig(bf16=True))
    tower, first, last = parse_layout("V*48R|L|L*31", model=QWEN_VL, pipeline_size=3).stages
    table, layer = 151936 * 4096 * 2, 2048 * (16 * 4096 + 6 * 11008 + STATISTICS)
    work = Work(num_images=4)
    assert [embedding_working_bytes(config, stage, work, FUSED) for stage in (tower, last)] == [0, 0]
    assert embedding_working_bytes(config, first, work, FUSED) == table - layer
    both = replace(first, patch_embed=True, vision_layers=range(48), resampler=True)
    assert embedding_working_bytes(config, both, work, FUSED) == table - layer, "the vision part is still kept then"
    many = replace(first, language_layers=range(16))
    assert embedding_working_bytes(config, many, work, FUSED) == 0


# --- real layers ----------------------------------------------------------------------------------------------------

IMAGES, TOKENS, LABELS = 3, 256, 100
MODEL = ModelConfig(
    preset="tiny",
    image_size=112,
    num_bpe_tokens=2048,
    vision=VisionConfig(num_layers=1, hidden_size=416, ffn_hidden_size=2048, num_attention_heads=4, position_grid=8),
    resampler=ResamplerConfig(num_queries=16, num_attention_heads=8),
    language=LanguageConfig(
        num_layers=1, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=4, vocab_size=2304
    ),
)
"""The ratios of the published model, at an eighth of its width."""


def _kept_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes of all storages that autograd keeps, without parameters; views count once, with all of their storage."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _measure(start: Start, config: RunConfig) -> dict[str, int]:
    """The bytes that the parts of the model keep, each on an input that needs a gradient."""
    with start.topology(config.parallel) as topology:
        (chunk,) = build_model(config, topology)
        chunk.train()
        language = chunk.language_model
        patches = torch.randn(64, IMAGES, 416, dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.randn(TOKENS, 1, 512, dtype=torch.bfloat16, requires_grad=True)
        line = language.attention_inputs(PackedLine.of([TOKENS]))
        chosen = torch.arange(LABELS)
        vision = replace_embedding(chunk.vision)
        return {
            "vision": _kept_bytes(lambda: vision(patches), chunk),
            "resampler": _kept_bytes(lambda: chunk.resampler(patches), chunk),
            "language": _kept_bytes(lambda: language(hidden, line), chunk),
            "head": _kept_bytes(lambda: language.token_losses(hidden, positions=chosen, targets=chosen), chunk),
        }


def replace_embedding(vision: Any) -> Any:
    """The tower without its patch embedding: its layers, on patches."""
    vision.has_patch_embed = False
    return vision


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("frozen", [False, True])
def test_real_layers_keep_what_is_counted(
    ranks: RankPools, recompute: Literal["full", "selective"] | None, frozen: bool
) -> None:
    config = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(backend="local"),
        data=DataConfig(seq_length=TOKENS),
        training=TrainingConfig(bf16=True, recompute_granularity=recompute, freeze_language_model=frozen),
    )
    found: dict[str, int] = ranks(1).run(_measure, config)[0]
    keeping = Keeping("local", recompute)
    vision = layer_bytes(LayerShape.vision(MODEL), keeping, trained=True)
    language = layer_bytes(LayerShape.language(MODEL), keeping, trained=not frozen)
    assert found["vision"] == pytest.approx(IMAGES * 64 * vision, rel=0.02)
    if recompute is None:
        language += 2 * 2 * 128  # the cosines and sines of a token, which all layers share
    assert found["language"] == pytest.approx(TOKENS * language, rel=0.02)
    (whole,) = PipelineLayout.whole(MODEL).stages
    alone = replace(whole, vision_layers=range(0), language_layers=range(0), patch_embed=False)
    resampler = chunk_bytes(config, replace(alone, head=False), Work(num_images=IMAGES), keeping)
    assert found["resampler"] == pytest.approx(resampler, rel=0.02)
    head = chunk_bytes(config, replace(alone, resampler=False), Work(num_supervised=LABELS), keeping)
    softmax = LABELS * 2304 * 4
    assert found["head"] == pytest.approx(head + softmax, rel=0.02)
