"""One step of a model with the head widths of the published one, on any device, backend and type.

What differs between two such steps is measured against the step in fp32 on the local backend: outputs of both towers,
and the gradients of each part. The device is whatever the process has, so that the same functions run on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import LanguageConfig, ModelConfig, ResamplerConfig, RunConfig, VisionConfig
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import forward_backward
from tests.gpu.differences import Difference, relative, relative_over
from tests.helpers.ranks import Start
from tests.helpers.tiny import micro_batches, tiny_config

# Heads of 104 and 128 features, as at 7B; few of everything else.
MODEL = ModelConfig(
    preset="qwen_vl_7b",
    image_size=112,
    num_bpe_tokens=448,
    init_method_std=0.05,
    vision=VisionConfig(num_layers=2, hidden_size=208, ffn_hidden_size=416, num_attention_heads=2, position_grid=6),
    resampler=ResamplerConfig(num_queries=4, num_attention_heads=2),
    language=LanguageConfig(num_layers=2, hidden_size=256, ffn_hidden_size=352, num_attention_heads=2, vocab_size=768),
)
TOWERS = ("vision", "resampler", "language_model")
BF16_OUTPUT, BF16_GRADIENT = 0.02, 0.04
"""How far one bf16 step may be from fp32, both relative."""
TWICE = 1.5
"""How much farther than the local backend another one may be."""
_FUSED = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Measured:
    """What one step computed, on the CPU."""

    loss: float
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def parity_config(backend: str, *, bf16: bool) -> RunConfig:
    """A run of the model; the optimizer has layer-wise decay, as in the recipes."""
    config = tiny_config(
        parallel={"backend": backend, "use_distributed_optimizer": True},
        training={"bf16": bf16, "deterministic_mode": False},
        optimizer={"vision_layer_decay": 0.95},
    )
    return replace(config, model=MODEL)


def step(start: Start, config: RunConfig, span: str, checkpoint: Path | None = None) -> Measured:
    """Forward and backward of four micro-batches, one of them without an image."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology, fresh_weights=checkpoint is None)
        if checkpoint:
            contents.load(contents.Trained(model.chunks, None), checkpoint, config=config, topology=topology)
        for wrapped in model.wrapped:
            wrapped.zero_grad_buffer()
        outputs: dict[str, Tensor] = {}
        _keep_outputs(model.chunks[0], outputs)
        batches = micro_batches(config.model, 4, span=span)
        loss, _ = forward_backward(model.wrapped, batches, topology=topology, forward_only=False)
        gradients = {
            plain_name(name): parameter.main_grad.detach().float().cpu().clone()
            for name, parameter in model.chunks[0].named_parameters()
        }
        return Measured(loss.mean, outputs, gradients)


def plain_name(name: str) -> str:
    """The local backend's name of a parameter; Transformer Engine keeps a norm inside the linear layer behind it."""
    for fused, plain in _FUSED.items():
        name = name.replace(fused, plain)
    return name


def against_exact(found: Measured, exact: Measured, *, allowed: dict[str, float], title: str) -> list[Difference]:
    """Loss, outputs and gradients; ``allowed`` by the same names as the differences, without the title."""
    values = distances(found, exact)
    return [Difference(f"{title}: {name}", value, allowed[name]) for name, value in values.items()]


def distances(found: Measured, exact: Measured) -> dict[str, float]:
    """How far a step is from another, by what it computes."""
    result = {"loss": abs(found.loss / exact.loss - 1.0)}
    for tower in exact.outputs:
        result[f"output of {tower}"] = relative(found.outputs[tower], exact.outputs[tower])
    for tower in TOWERS:
        result[f"gradients of {tower}"] = relative_over(found.gradients, exact.gradients, prefix=f"{tower}.")
    return result


def bf16_limits(exact: Measured) -> dict[str, float]:
    """What rounding to bf16 explains."""
    limits = {"loss": BF16_OUTPUT}
    limits |= {f"output of {tower}": BF16_OUTPUT for tower in exact.outputs}
    return limits | {f"gradients of {tower}": BF16_GRADIENT for tower in TOWERS}


def parity(start: Start, span: str, others: Iterable[str] = ()) -> list[Difference]:
    """bf16 on the local backend against fp32, and other backends in bf16 beside it."""
    exact = step(start, parity_config("local", bf16=False), span)
    local = step(_again(start, 1), parity_config("local", bf16=True), span)
    found = against_exact(local, exact, allowed=bf16_limits(exact), title=f"local bf16, {span}")
    near = {name: TWICE * value + 1e-3 for name, value in distances(local, exact).items()}
    for number, backend in enumerate(others):
        other = step(_again(start, 2 + number), parity_config(backend, bf16=True), span)
        found += against_exact(other, exact, allowed=near, title=f"{backend} bf16, {span}")
    return found


def _again(start: Start, number: int) -> Start:
    """Another meeting place: a file that ranks met at is not used again."""
    return replace(start, init_method=f"{start.init_method}.{number}")


def _keep_outputs(chunk: nn.Module, outputs: dict[str, Tensor]) -> None:
    """Keep what the towers hand on, of the first micro-batch."""
    for name in ("vision", "language_model"):

        def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            outputs.setdefault(name, output.detach().float().cpu())

        getattr(chunk, name).register_forward_hook(keep)
