"""The network that is built has the tensors that planning counts, and the same fresh weights at every layout."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model, build_on_meta
from megatron_vl.planning.parameters import model_tensors
from tests.helpers.pieces import VOCABULARY, Piece, take_pieces, whole_tensors
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, tiny_config


def _shapes_on_meta(start: Start, config: RunConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    with start.topology(config.parallel) as topology:
        model = build_on_meta(config, topology)
        assert model.config.use_cpu_initialization, "Megatron-Core would name the CUDA device"
        assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        return {
            "parameters": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            "buffers": {name: tuple(buffer.shape) for name, buffer in model.named_buffers()},
        }


@pytest.mark.parametrize("preset", ["tiny", "qwen_vl_7b"])
def test_the_built_model_has_the_planned_tensors(ranks: RankPools, preset: str) -> None:
    model = PRESETS[preset]
    shapes = ranks(1).run(_shapes_on_meta, replace(tiny_config(), model=model))[0]
    planned = {spec.name: spec for spec in model_tensors(model)}
    assert shapes["parameters"] == {name: spec.shape for name, spec in planned.items() if not spec.is_buffer}
    assert shapes["buffers"] == {name: spec.shape for name, spec in planned.items() if spec.is_buffer}
    if preset == "qwen_vl_7b":
        assert sum(math.prod(shape) for shape in shapes["parameters"].values()) == 9_655_886_592
        assert [math.prod(shape) for shape in shapes["buffers"].values()] == [1_048_576]


def _fresh_weights(start: Start, config: RunConfig) -> dict[str, Piece]:
    with start.topology(config.parallel) as topology:
        return take_pieces(build_model(config, topology), topology.tp_rank, lambda parameter: parameter)


def _streams_after_building(start: Start, config: RunConfig) -> set[str]:
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    with start.topology(config.parallel) as topology:
        build_model(config, topology, fresh_weights=False)
    return set(tracker.get_states())


def test_whoever_builds_a_model_has_the_streams_of_its_layers(ranks: RankPools) -> None:
    """A layer of Transformer Engine forks them when it is built, also for evaluation, which seeds nothing."""
    assert "model-parallel-rng" in ranks(1).run(_streams_after_building, tiny_config())[0]


def _whole_fresh(ranks: RankPools, world_size: int, **sections: dict[str, Any]) -> dict[str, Tensor]:
    pieces = ranks(world_size).run(_fresh_weights, tiny_config(**sections))
    return whole_tensors(pieces, vocab_size=MODEL.language.vocab_size)


@pytest.fixture(scope="module")
def fresh(ranks: RankPools) -> dict[str, Tensor]:
    return _whole_fresh(ranks, 1)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
    ids=["tp2", "pp2-vp2"],
)
def test_fresh_weights_are_the_same_at_every_layout(
    ranks: RankPools, fresh: dict[str, Tensor], parallel: dict[str, Any]
) -> None:
    found = _whole_fresh(ranks, 2, parallel=parallel)
    assert found.keys() == fresh.keys()
    assert [name for name, value in fresh.items() if not torch.equal(found[name], value)] == []


def test_fresh_weights_follow_the_seed(ranks: RankPools, fresh: dict[str, Tensor]) -> None:
    other = _whole_fresh(ranks, 1, training={"seed": 1})
    same = {name for name, value in fresh.items() if torch.equal(other[name], value)}
    assert same == {name for name in fresh if "bias" in name or "layernorm" in name or ".ln_" in name}
    drawn = {name: value for name, value in fresh.items() if name not in same and value.numel() > 64}
    assert len({tuple(value.flatten()[:8].tolist()) for value in drawn.values()}) == len(drawn), "each its own numbers"


def test_fresh_weights_have_their_deviations(fresh: dict[str, Tensor]) -> None:
    std, residual = MODEL.init_method_std, MODEL.init_method_std / math.sqrt(2 * 4)
    expected = {
        **dict.fromkeys(VOCABULARY, std),
        "language_model.layers.0.self_attention.linear_qkv.weight": std,
        "language_model.layers.3.mlp.linear_fc1.weight": std,
        "language_model.layers.3.mlp.linear_fc2.weight": residual,
        "vision.layers.1.self_attention.linear_proj.weight": residual,
        "vision.patch_embed.weight": (3 * 14 * 14) ** -0.5,
        "vision.positional_embedding": MODEL.vision.hidden_size**-0.5,
        "resampler.proj": MODEL.language.hidden_size**-0.5,
        "resampler.attn.in_proj_weight": math.sqrt(6 / (4 * 64)) / math.sqrt(3),  # uniform, Xavier
        "resampler.kv_proj.weight": 0.02,  # the original cuts at +-2, a hundred deviations
    }
    for name, deviation in expected.items():
        assert fresh[name].std().item() == pytest.approx(deviation, rel=0.1), name
        assert abs(fresh[name].mean().item()) < 0.1 * deviation, name
    norms = [value for name, value in fresh.items() if "norm" in name and name.endswith("weight")]
    assert norms and all(torch.equal(value, torch.ones_like(value)) for value in norms)


def _head_on_rank(
    start: Start, config: RunConfig, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, losses, and the gradients of the input and of the output layer; padding rows have wild weights."""
    with start.topology(config.parallel) as topology:
        head = build_model(config, topology)[0].language_model
        weight, first = head.output_layer.weight, topology.tp_rank * head.output_layer.weight.shape[0]
        with torch.no_grad():
            weight[max(head.vocab_size - first, 0) :] = 1e4
        line, positions = hidden.clone().requires_grad_(), torch.arange(len(targets))
        logits = head.logits(line, positions=positions).detach().clone()
        losses = head.token_losses(line, positions=positions, targets=targets)
        losses.sum().backward()
        return logits, losses.detach(), line.grad, weight.grad


@pytest.mark.parametrize("vocab_size", [500, 100])  # with 100, the second rank has nothing but padding
def test_padding_of_the_vocabulary_is_in_no_logits_and_no_loss(ranks: RankPools, vocab_size: int) -> None:
    language = replace(MODEL.language, vocab_size=vocab_size)
    config = tiny_config(parallel={"tensor_model_parallel_size": 2})
    config = replace(config, model=replace(MODEL, language=language))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 1, language.hidden_size, generator=generator)
    targets = torch.randint(0, vocab_size, (6,), generator=generator)
    parts = ranks(2).run(_head_on_rank, config, hidden, targets)
    logits = torch.cat([part[0] for part in parts], dim=1)
    assert logits.shape[1] == (512 if vocab_size == 500 else 256)
    assert (logits[:, vocab_size:] == float("-inf")).all() and logits[:, :vocab_size].isfinite().all()
    expected = F.cross_entropy(logits[:, :vocab_size], targets, reduction="none")
    for _, losses, gradient, _ in parts:
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        assert gradient.isfinite().all() and gradient.abs().max() < 100, "nothing comes from the padding's weights"
    rows = torch.cat([part[3] for part in parts])
    assert torch.equal(rows[vocab_size:], torch.zeros_like(rows[vocab_size:]))
    assert (rows[:vocab_size].abs().sum(dim=1) > 0).all()


def _head_without_labels(start: Start, config: RunConfig, hidden: Tensor) -> tuple[list[int], list[bool]]:
    """Rows that the final norm gets; whether its, the head's and the input's gradients are zeros."""
    with start.topology(config.parallel) as topology:
        head = build_model(config, topology)[0].language_model
        rows: list[int] = []
        head.final_layernorm.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        line, nothing = hidden.clone().requires_grad_(), torch.zeros(0, dtype=torch.int64)
        losses = head.token_losses(line, positions=nothing, targets=nothing)
        assert losses.shape == (0,)
        losses.sum().backward()
        gradients = [line.grad, head.final_layernorm.weight.grad, head.output_layer.weight.grad]
        return rows, [gradient is not None and not gradient.any() for gradient in gradients]


def test_the_head_never_runs_on_no_rows(ranks: RankPools) -> None:
    """Transformer Engine's norm would launch a grid of none; every weight gets a gradient all the same."""
    config = tiny_config(parallel={"tensor_model_parallel_size": 2})
    hidden = torch.randn(6, 1, MODEL.language.hidden_size, generator=torch.Generator().manual_seed(0))
    assert ranks(2).run(_head_without_labels, config, hidden) == [([1], [True] * 3)] * 2
