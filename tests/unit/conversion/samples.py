"""Models to convert: the original's own folder, and random contents of further sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ModelConfig
from megatron_vl.planning.parameters import model_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl" / "qwen_vl_hf_tiny"


class State(dict[str, Tensor]):
    """Tensors in memory, as a source of them."""

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype


def random_state(model: ModelConfig, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> State:
    """Our tensors with random contents."""
    generator = torch.Generator().manual_seed(seed)
    return State({s.name: torch.randn(s.shape, generator=generator).to(dtype) for s in model_tensors(model)})


def small_model() -> ModelConfig:
    """Sizes that no preset has, unlike each other wherever a mix-up could hide."""
    tiny = PRESETS["tiny"]
    return replace(
        tiny,
        preset="qwen_vl_7b",
        num_bpe_tokens=256,
        vision=replace(tiny.vision, num_layers=2, hidden_size=24, ffn_hidden_size=56, num_attention_heads=3),
        resampler=replace(tiny.resampler, num_queries=4, num_attention_heads=2),
        language=replace(
            tiny.language,
            num_layers=3,
            hidden_size=32,
            ffn_hidden_size=40,
            num_attention_heads=4,
            vocab_size=512,
        ),
    )


def read_with_libraries(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under their published names, read by torch and safetensors alone."""
    tensors: dict[str, Tensor] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors" and file.name != "expected.safetensors":
            tensors |= load_file(file)
        elif file.suffix == ".bin":
            tensors |= torch.load(file, weights_only=True)
    return tensors


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, shapes, types and bytes."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
