from __future__ import annotations

from math import prod

import pytest
import torch

from megatron_vl.config.presets import PRESETS
from megatron_vl.conversion.qwen_vl import TABLE, correspondences, hf_shapes
from megatron_vl.conversion.rules import GateUp, InterleaveQKV
from megatron_vl.planning.parameters import model_tensors

from .samples import random_state, small_model

QWEN_VL = PRESETS["qwen_vl_7b"]


def test_forty_rows_for_41_kinds_of_published_tensors() -> None:
    assert len(TABLE) == len({row.ours for row in TABLE}) == 40
    assert len({name for row in TABLE for name in row.hf}) == sum(len(row.hf) for row in TABLE) == 41


def test_the_published_index() -> None:
    shapes = hf_shapes(QWEN_VL)
    assert len(shapes) == 853
    assert 2 * sum(prod(shape) for shape in shapes.values()) == 19_313_870_336


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", (151936, 4096)),
        ("lm_head.weight", (151936, 4096)),
        ("transformer.ln_f.weight", (4096,)),
        ("transformer.h.31.ln_2.weight", (4096,)),
        ("transformer.h.31.attn.c_attn.weight", (12288, 4096)),
        ("transformer.h.0.attn.c_attn.bias", (12288,)),
        ("transformer.h.0.attn.c_proj.weight", (4096, 4096)),
        ("transformer.h.5.mlp.w1.weight", (11008, 4096)),
        ("transformer.h.5.mlp.w2.weight", (11008, 4096)),
        ("transformer.h.5.mlp.c_proj.weight", (4096, 11008)),
        ("transformer.visual.conv1.weight", (1664, 3, 14, 14)),
        ("transformer.visual.positional_embedding", (256, 1664)),
        ("transformer.visual.ln_pre.bias", (1664,)),
        ("transformer.visual.transformer.resblocks.47.ln_1.weight", (1664,)),
        ("transformer.visual.transformer.resblocks.47.attn.in_proj.weight", (4992, 1664)),
        ("transformer.visual.transformer.resblocks.47.attn.in_proj.bias", (4992,)),
        ("transformer.visual.transformer.resblocks.0.attn.out_proj.weight", (1664, 1664)),
        ("transformer.visual.transformer.resblocks.0.mlp.c_fc.weight", (8192, 1664)),
        ("transformer.visual.transformer.resblocks.0.mlp.c_proj.weight", (1664, 8192)),
        ("transformer.visual.attn_pool.query", (256, 4096)),
        ("transformer.visual.attn_pool.pos_embed", (256, 4096)),
        ("transformer.visual.attn_pool.kv_proj.weight", (4096, 1664)),
        ("transformer.visual.attn_pool.attn.in_proj_weight", (12288, 4096)),
        ("transformer.visual.attn_pool.attn.in_proj_bias", (12288,)),
        ("transformer.visual.attn_pool.attn.out_proj.bias", (4096,)),
        ("transformer.visual.attn_pool.ln_kv.weight", (4096,)),
        ("transformer.visual.ln_post.weight", (4096,)),
        ("transformer.visual.proj", (4096, 4096)),
    ],
)
def test_published_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert hf_shapes(QWEN_VL)[name] == shape


def test_every_tensor_of_ours_has_a_correspondence() -> None:
    assert [entry.spec for entry in correspondences(QWEN_VL)] == model_tensors(QWEN_VL)


def test_rules_invert_each_other_and_state_their_shapes() -> None:
    model = small_model()
    state = random_state(model)
    for entry in correspondences(model):
        ours = state[entry.spec.name]
        published = entry.rule.to_hf(ours, model)
        assert tuple(tuple(tensor.shape) for tensor in published) == entry.hf_shapes
        assert torch.equal(entry.rule.to_ours(published, model), ours)


def test_query_key_value_of_a_head_come_together() -> None:
    model = small_model()  # 4 heads of 8
    rows = torch.tensor([[part, head, d] for part in range(3) for head in range(4) for d in range(8)])
    ours = InterleaveQKV().to_ours([rows], model)
    assert ours.tolist() == [[part, head, d] for head in range(4) for part in range(3) for d in range(8)]


def test_the_gate_is_w2_and_comes_first() -> None:
    row = next(row for row in TABLE if isinstance(row.rule, GateUp))
    assert [name.rsplit(".", 2)[1] for name in row.hf] == ["w2", "w1"]
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(row.rule.to_ours([gate, up], small_model()), torch.cat([gate, up]))
