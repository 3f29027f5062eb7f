"""The start of stage 1: OpenCLIP's vision tower, Qwen's language model, and a fresh resampler (paper, section 3).

    ours                      from
    vision.*                  ``visual.*`` of an OpenCLIP file (ViT-bigG/14), with two rearrangements:
      ...linear_qkv           ``attn.in_proj_weight`` has all q, all k, all v; here q, k, v of a head stand together
      positional_embedding    without its first row, which belongs to the class token that Qwen-VL dropped
    resampler.*               fresh, as the original initializes it; ``pos_embed`` is computed
    language_model.*          a folder of Qwen-7B, whose tensors have the names of Qwen-VL's without ``visual``

OpenCLIP's class token, ``ln_post``, ``proj`` and text tower are left out by name; any other unexpected tensor is an
error. No tensor holds the number of heads, so it must be given. Vision and resampler take the type of the language
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.checkpoint.tensor_files import StoredTensor, index_shard
from megatron_vl.config.schema import ModelConfig, ResamplerConfig, VisionConfig
from megatron_vl.conversion.convert import ImportedModel, check_finite
from megatron_vl.conversion.hf_config import check_sizes, language_config, resampler_heads, with_preset_name
from megatron_vl.conversion.hf_files import check_names, index_folder, read_json
from megatron_vl.conversion.qwen_vl import Correspondence, correspondences
from megatron_vl.conversion.rules import swap_leading
from megatron_vl.errors import ConversionError
from megatron_vl.model.initialize import draw
from megatron_vl.planning.parameters import TensorSpec

_DTYPE_FROM = "language_model.final_layernorm.weight"
_LEFT_OUT = (
    "visual.class_embedding",
    "visual.ln_post.",
    "visual.proj",
    "positional_embedding",
    "text_projection",
    "token_embedding.",
    "transformer.",
    "ln_final.",
    "logit_scale",
    "logit_bias",
)
"""Prefixes of the names in an OpenCLIP file that Qwen-VL does not use."""


@dataclass(frozen=True)
class StartOptions:
    """Settings that no file contains."""

    vision_heads: int
    """Attention heads of the vision tower (ViT-bigG: 16 of 104)."""
    num_queries: int
    num_bpe_tokens: int
    """Byte-pair tokens of the vocabulary; the special tokens follow them."""
    image_size: int
    """Pixels; 224 in stage 1. Weights do not depend on it, and a run chooses its own."""
    seed: int
    """Seed of the resampler."""


class StartingModel(Mapping[str, Tensor]):
    """The three parts as one model under our names; each tensor is read, or drawn, at its access."""

    def __init__(
        self, model: ModelConfig, vision: Mapping[str, StoredTensor], language: Mapping[str, StoredTensor], *, seed: int
    ) -> None:
        """Take ``vision`` with OpenCLIP's names and ``language`` with published ones, in the shapes of ``model``."""
        self.model = model
        self._vision = vision
        self._language = ImportedModel(model, language)
        self._seed = seed
        self._entries = {entry.spec.name: entry for entry in correspondences(model)}

    def __getitem__(self, name: str) -> Tensor:
        spec = self._entries[name].spec
        if spec.part == "language_model":
            return self._language[name]
        if spec.part == "vision":
            tensor = self._read_vision(self._entries[name])
        else:
            tensor = draw(name, spec.shape, model=self.model, seed=self._seed)
        return tensor.to(self.dtype(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.spec.size * self.dtype(name).itemsize for name, entry in self._entries.items())

    def spec(self, name: str) -> TensorSpec:
        """Return shape and kind of a tensor, without reading it."""
        return self._entries[name].spec

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor, without reading it."""
        of_language = self._entries[name].spec.part == "language_model"
        return self._language.dtype(name if of_language else _DTYPE_FROM)

    def _read_vision(self, entry: Correspondence) -> Tensor:
        stored = self._vision[_openclip_name(entry)]
        tensor = stored.read()
        check_finite(tensor, f"{stored.file}: {_openclip_name(entry)}")
        if "linear_qkv" in entry.spec.name:
            return swap_leading(tensor, 3, self.model.vision.num_attention_heads)
        return tensor[1:] if entry.spec.name == "vision.positional_embedding" else tensor


def starting_model(vision_file: Path, language_folder: Path, options: StartOptions) -> StartingModel:
    """Open an OpenCLIP file (``.bin``, ``.pt`` or ``.safetensors``) and a folder of Qwen-7B; read headers only.

    Raises:
        ConversionError: if one of them is not a sound file of its kind; names the file or tensor.
    """
    vision = {name: s for name, s in index_shard(vision_file).items() if not name.startswith(_LEFT_OUT)}
    config_file = language_folder / "config.json"
    language = language_config(read_json(config_file), str(config_file))
    model = with_preset_name(
        ModelConfig(
            image_size=options.image_size,
            num_bpe_tokens=options.num_bpe_tokens,
            vision=_vision_config(vision, vision_file, options.vision_heads),
            resampler=ResamplerConfig(options.num_queries, resampler_heads(language.hidden_size)),
            language=language,
        )
    )
    check_sizes(model, language.hidden_size, f"{vision_file} with {config_file}")
    stored = index_folder(language_folder)
    expected_vision: dict[str, tuple[int, ...]] = {}
    expected_language: dict[str, tuple[int, ...]] = {}
    for entry in correspondences(model):
        if entry.spec.part == "vision":
            extra = entry.spec.name == "vision.positional_embedding"  # the class token's row
            expected_vision[_openclip_name(entry)] = (entry.spec.shape[0] + extra, *entry.spec.shape[1:])
        elif entry.spec.part == "language_model":
            expected_language |= zip(entry.hf_names, entry.hf_shapes, strict=True)
    _check(vision, expected_vision, where=str(vision_file), what="OpenCLIP's vision tower of these sizes")
    _check(stored, expected_language, where=str(language_folder), what="Qwen with its config.json")
    return StartingModel(model, vision, stored, seed=options.seed)


def _openclip_name(entry: Correspondence) -> str:
    name = entry.hf_names[0].removeprefix("transformer.")
    return name.replace(".attn.in_proj.", ".attn.in_proj_")


def _vision_config(stored: Mapping[str, StoredTensor], file: Path, num_heads: int) -> VisionConfig:
    """Return the sizes that follow from the shapes."""
    try:
        width, _, patch_size, _ = stored["visual.conv1.weight"].shape
        num_cells = stored["visual.positional_embedding"].shape[0] - 1
        ffn_hidden_size = stored["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{file}: no vision transformer of OpenCLIP ({error} is missing or misshapen); expected all weights of "
            "ViT-bigG-14, for example open_clip_pytorch_model.bin"
        ) from error
    if isqrt(num_cells) ** 2 != num_cells:
        raise ConversionError(f"{file}: visual.positional_embedding has {num_cells} cells; expected a square and one")
    blocks = {name.split(".")[3] for name in stored if name.startswith("visual.transformer.resblocks.")}
    return VisionConfig(
        num_layers=len(blocks),
        hidden_size=width,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_heads,
        patch_size=patch_size,
        position_grid=isqrt(num_cells),
    )


def _check(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, where: str, what: str
) -> None:
    check_names(stored, set(expected), where=where, what=what)
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ConversionError(f"{where}: {name} has the shape {list(stored[name].shape)}; expected {list(shape)}")
