"""Convert between a published folder and our tensors, in both directions, in one process, one tensor at a time.

A model is here a mapping from our names (global layer numbers, unsharded, see :mod:`megatron_vl.planning.parameters`)
to tensors. :class:`ImportedModel` reads its tensors at their access, so its consumer can stream them.
:func:`export_folder` takes any such mapping. This module uses no ranks or checkpoints.

Invariant: a round trip gives every byte and every type back. A tensor that is missing, unknown, of another shape or not
finite is refused by name, before or instead of writing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_vl.checkpoint.tensor_files import DTYPES, StoredTensor
from megatron_vl.checkpoint.tensors import TensorSource, read_ahead
from megatron_vl.config.schema import ModelConfig
from megatron_vl.conversion.hf_config import (
    TOKENIZER_CONFIG,
    Release,
    generation_config,
    hf_config,
    model_config,
)
from megatron_vl.conversion.hf_files import FolderWriter, check_names, index_folder, read_json, write_folder
from megatron_vl.conversion.qwen_vl import Correspondence, correspondences, hf_shapes
from megatron_vl.conversion.shards import FileFormat, PlannedTensor
from megatron_vl.data.prompting.tokenizer import read_ranks
from megatron_vl.errors import ConversionError
from megatron_vl.planning.parameters import TensorSpec, model_tensors

_REFERENCE_PATTERNS = ("*.py", "*.tiktoken", "tokenizer_config.json", "LICENSE*", "NOTICE*", "*.ttf")
_EXPONENTS = {
    torch.bfloat16: (np.uint16, np.uint16(0x7F80)),
    torch.float16: (np.uint16, np.uint16(0x7C00)),
    torch.float32: (np.uint32, np.uint32(0x7F800000)),
}
"""If all exponent bits are ones, the value is infinite or NaN."""
_PIECE = 2**18
_DTYPE_FROM = "language_model.final_layernorm.weight"


@dataclass(frozen=True)
class ExportOptions:
    """Contents of an exported folder besides the weights, and how they are stored."""

    file_format: FileFormat = "safetensors"
    """Kind of the weight files."""
    release: Release = "base"
    """The release whose generation defaults are written."""
    reference: Path | None = None
    """Folder that was imported: its code, tokenizer and license files are copied, its other settings kept."""
    vocab_file: Path | None = None
    """Qwen's ``.tiktoken`` file: the tokenizer's files are written, cut to the model's byte-pair tokens."""
    max_shard_bytes: int = 2 * 10**9
    """Size above which a new weight file begins."""


class ConvertedModel(TensorSource, Protocol):
    """A model of ours whose tensors come from elsewhere; each is read and checked at its access."""

    model: ModelConfig

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""

    def spec(self, name: str) -> TensorSpec:
        """Return shape and kind of a tensor, without reading it."""


class ImportedModel(Mapping[str, Tensor]):
    """A published folder as a mapping from our names to tensors; each is read and checked at its access."""

    def __init__(self, model: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
        """Take ``stored``, all published tensors of ``model`` with the right shapes."""
        self.model = model
        self._stored = stored
        self._entries = {entry.spec.name: entry for entry in correspondences(model)}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensors = []
        for hf_name in entry.hf_names:
            stored = self._stored[hf_name]
            tensor = stored.read()
            check_finite(tensor, f"{stored.file}: {hf_name}")
            tensors.append(tensor)
        return entry.rule.to_ours(tensors, self.model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.num_bytes for stored in self._stored.values())

    def spec(self, name: str) -> TensorSpec:
        """Return shape and kind of one of our tensors, without reading it."""
        return self._entries[name].spec

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of one of our tensors, without reading it."""
        return self._stored[self._entries[name].hf_names[0]].dtype


def import_folder(folder: Path) -> ImportedModel:
    """Open a folder in the published layout; read its configuration and the headers of its weight files.

    Raises:
        ConversionError: if the folder is not a sound Qwen-VL folder; names the file or tensor.
    """
    config_file = folder / "config.json"
    model = model_config(read_json(config_file), str(config_file))
    stored = index_folder(folder)
    _check_stored(stored, model, folder)
    return ImportedModel(model, stored)


def export_folder(
    state: TensorSource,
    model: ModelConfig,
    folder: Path,
    *,
    options: ExportOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write our tensors as a folder in the published layout, and return the bytes of all tensors.

    ``state`` may pad the vocabulary; the padding is not written. ``progress`` is called with the bytes of each tensor.

    Raises:
        ConversionError: if a tensor is missing, unknown, of a wrong shape or not finite, or the folder is in use.
    """
    options = options or ExportOptions()
    reference = _reference_config(model, options)
    entries = {entry.spec.name: entry for entry in correspondences(model)}
    check_names(state, set(entries), where="the model", what="its configuration")
    for name in entries:
        _check_dtype(name, state.dtype(name))
    plan = [
        PlannedTensor(hf_name, state.dtype(name), shape)
        for name, entry in entries.items()
        for hf_name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    ]

    def read(name: str) -> Sequence[Tensor]:
        return _published(entries[name], state[name], model)

    with write_folder(folder, plan, file_format=options.file_format, max_shard_bytes=options.max_shard_bytes) as writer:
        _add_side_files(writer, model, options)
        for name, tensors in read_ahead(list(entries), read):
            for hf_name, tensor in zip(entries[name].hf_names, tensors, strict=True):
                writer.add_tensor(hf_name, tensor)
                if progress:
                    progress(tensor.nbytes)
            del tensors, tensor
        dtype = str(state.dtype(_DTYPE_FROM)).removeprefix("torch.")
        writer.add_json("config.json", hf_config(model, dtype, reference))
    return sum(tensor.num_bytes for tensor in plan)


def check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ConversionError unless a tensor of ours has its shape, a stored float type, and finite values."""
    found, expected = tuple(tensor.shape), spec.shape
    padded = spec.is_vocabulary and found[1:] == expected[1:] and found[:1] > expected[:1]
    if found != expected and not padded:
        raise ConversionError(f"{spec.name} has the shape {list(found)}; expected {list(expected)}")
    _check_dtype(spec.name, tensor.dtype)
    check_finite(tensor, spec.name)


def check_model(state: TensorSource, model: ModelConfig, *, progress: Callable[[int], None] | None = None) -> None:
    """Raise ConversionError unless ``state`` has exactly the model's tensors, each sound."""
    specs = {spec.name: spec for spec in model_tensors(model)}
    check_names(state, set(specs), where="the model", what="its configuration")
    for name, tensor in read_ahead(list(specs), lambda name: state[name]):
        check_tensor(specs[name], tensor)
        if progress:
            progress(tensor.nbytes)
        del tensor


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise ConversionError if a value is infinite or NaN. Check exponents, a part of the tensor at a time."""
    integers, exponent = _EXPONENTS[tensor.dtype]
    flat = tensor.contiguous().flatten().view(torch.uint8).numpy().view(integers)
    pieces = (flat[start : start + _PIECE] & exponent == exponent for start in range(0, len(flat), _PIECE))
    if count := sum(int(np.count_nonzero(piece)) for piece in pieces):
        raise ConversionError(f"{where} has {count} values that are not finite; the file is damaged or diverged")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES.values():
        raise ConversionError(f"{name} is {dtype}; expected bfloat16, float16 or float32")


def _published(entry: Correspondence, tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    check_tensor(entry.spec, tensor)
    return entry.rule.to_hf(tensor, model)


def _add_side_files(writer: FolderWriter, model: ModelConfig, options: ExportOptions) -> None:
    """Write everything but weights and ``config.json``."""
    if options.reference is not None:
        for file in sorted({f for pattern in _REFERENCE_PATTERNS for f in options.reference.glob(pattern)}):
            writer.copy(file)
    if options.vocab_file is not None:
        ranks = list(read_ranks(options.vocab_file))[: model.num_bpe_tokens]
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
        writer.add_bytes("qwen.tiktoken", "".join(lines).encode())
        writer.add_json("tokenizer_config.json", TOKENIZER_CONFIG)
    writer.add_json("generation_config.json", generation_config(model, options.release))


def _reference_config(model: ModelConfig, options: ExportOptions) -> dict[str, object] | None:
    """Return the settings of the reference, which must be of this kind of model, with a tokenizer of this vocabulary.

    Raises:
        ConversionError: if the folder would describe another model, or contain the tokenizer of one.
    """
    if options.reference is None:
        return None
    file = options.reference / "config.json"
    content = read_json(file)
    found = model_config(content, str(file)).num_bpe_tokens
    if found != model.num_bpe_tokens and options.vocab_file is None:
        raise ConversionError(
            f"{file}: its image_start_id implies {found} byte-pair tokens, and the model has {model.num_bpe_tokens}: "
            "its tokenizer is not the model's. Give --vocab-file, or the folder that was imported"
        )
    if "quantization_config" in content:
        raise ConversionError(f"{file}: describes quantized weights; give the folder that was imported")
    return content


def _check_stored(stored: Mapping[str, StoredTensor], model: ModelConfig, folder: Path) -> None:
    shapes = hf_shapes(model)
    check_names(stored, set(shapes), where=str(folder), what="its config.json")
    for name, shape in shapes.items():
        found = stored[name]
        if found.shape != shape:
            raise ConversionError(
                f"{found.file}: {name} has the shape {list(found.shape)}; "
                f"{folder / 'config.json'} makes it {list(shape)}"
            )
    for entry in correspondences(model):
        dtypes = {stored[name].dtype for name in entry.hf_names}
        if len(dtypes) > 1:
            raise ConversionError(f"{folder}: {' and '.join(entry.hf_names)} have different types; expected one")
