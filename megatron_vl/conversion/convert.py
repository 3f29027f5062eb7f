"""Both directions between a published folder and our tensors, in one process, one tensor at a time.

What stands for a model here is a mapping from our names (global layer numbers, unsharded, see
:mod:`megatron_vl.planning.parameters`) to tensors. :class:`ImportedModel` is one whose tensors are read when
they are asked for, so that whatever stores them can stream; :func:`export_folder` takes any such mapping.
Nothing here knows ranks or checkpoints.

Invariant: what goes in comes out again, byte for byte and type for type. Whatever is missing, unknown, of
another shape or not finite is refused by name, before or instead of writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.config.schema import ModelConfig
from megatron_vl.conversion.hf_config import Release, generation_config, hf_config, model_config
from megatron_vl.conversion.hf_files import FileFormat, FolderWriter, check_names, index_folder, read_json
from megatron_vl.conversion.qwen_vl import Correspondence, correspondences, hf_shapes
from megatron_vl.conversion.tensor_files import DTYPES, StoredTensor
from megatron_vl.errors import ConversionError
from megatron_vl.planning.parameters import TensorSpec, model_tensors

_REFERENCE_PATTERNS = ("*.py", "*.tiktoken", "tokenizer_config.json", "LICENSE*", "NOTICE*", "*.ttf")


@dataclass(frozen=True)
class ExportOptions:
    """What an exported folder holds besides the weights, and how they are stored."""

    file_format: FileFormat = "safetensors"
    """Kind of the weight files."""
    release: Release = "base"
    """Whose generation defaults to write."""
    reference: Path | None = None
    """Folder that was imported: its code, tokenizer and licence files are copied, its other settings kept."""
    tokenizer_files: tuple[Path, ...] = ()
    """Further files to copy."""
    max_shard_bytes: int = 2 * 10**9
    """Size above which a new weight file begins."""


class ImportedModel(Mapping[str, Tensor]):
    """A published folder as a mapping from our names to tensors, each read and checked when asked for."""

    def __init__(self, model: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
        """``stored`` holds the published tensors of ``model``, all of them, with the right shapes."""
        self.model = model
        self._stored = stored
        self._entries = {entry.spec.name: entry for entry in correspondences(model)}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensors = []
        for hf_name in entry.hf_names:
            stored = self._stored[hf_name]
            tensor = stored.read()
            _check_finite(tensor, f"{stored.file}: {hf_name}")
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
        """Shape and kind of one of our tensors, without reading it."""
        return self._entries[name].spec

    def dtype(self, name: str) -> torch.dtype:
        """Type of one of our tensors, without reading it."""
        return self._stored[self._entries[name].hf_names[0]].dtype


def import_folder(folder: Path) -> ImportedModel:
    """Open a folder in the published layout; reads its configuration and the headers of its weight files.

    Raises:
        ConversionError: the folder is not a sound Qwen-VL folder; names the file or tensor.
    """
    config_file = folder / "config.json"
    model = model_config(read_json(config_file), str(config_file))
    stored = index_folder(folder)
    _check_stored(stored, model, folder)
    return ImportedModel(model, stored)


def export_folder(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    folder: Path,
    *,
    options: ExportOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write our tensors as a folder in the published layout; returns the bytes of all tensors.

    ``state`` may pad the vocabulary; the padding stays behind. ``progress`` is called with the bytes of each
    tensor.

    Raises:
        ConversionError: a tensor is missing, unknown, of a wrong shape or not finite, or the folder is in
            use.
    """
    options = options or ExportOptions()
    entries = correspondences(model)
    check_names(state, {entry.spec.name for entry in entries}, where="the model", what="its configuration")
    total = 0
    with FolderWriter(
        folder, file_format=options.file_format, max_shard_bytes=options.max_shard_bytes
    ) as writer:
        dtype = _add_side_files(writer, state, model, options)
        for entry in entries:
            for name, tensor in _published(entry, state[entry.spec.name], model):
                writer.add_tensor(name, tensor)
                size = tensor.numel() * tensor.element_size()
                total += size
                if progress:
                    progress(size)
        writer.add_json("config.json", hf_config(model, dtype, _reference_config(options.reference)))
    return total


def check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ConversionError unless a tensor of ours has its shape, a stored float type, and finite values."""
    found, expected = tuple(tensor.shape), spec.shape
    padded = spec.is_vocabulary and found[1:] == expected[1:] and found[:1] > expected[:1]
    if found != expected and not padded:
        raise ConversionError(f"{spec.name} has the shape {list(found)}; expected {list(expected)}")
    if tensor.dtype not in DTYPES.values():
        raise ConversionError(f"{spec.name} is {tensor.dtype}; expected bfloat16, float16 or float32")
    _check_finite(tensor, spec.name)


def check_model(state: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Raise ConversionError unless ``state`` has exactly the model's tensors, each sound."""
    specs = model_tensors(model)
    check_names(state, {spec.name for spec in specs}, where="the model", what="its configuration")
    for spec in specs:
        check_tensor(spec, state[spec.name])


def _published(entry: Correspondence, tensor: Tensor, model: ModelConfig) -> list[tuple[str, Tensor]]:
    check_tensor(entry.spec, tensor)
    return list(zip(entry.hf_names, entry.rule.to_hf(tensor, model), strict=True))


def _add_side_files(
    writer: FolderWriter, state: Mapping[str, Tensor], model: ModelConfig, options: ExportOptions
) -> str:
    """Everything but weights and config.json; returns the name of the weights' type."""
    files = list(options.tokenizer_files)
    if options.reference is not None:
        files += sorted({file for pattern in _REFERENCE_PATTERNS for file in options.reference.glob(pattern)})
    for file in files:
        if not file.is_file():
            raise ConversionError(f"{file}: no such file; it should be copied into the exported folder")
        writer.copy(file)
    writer.add_json("generation_config.json", generation_config(model, options.release))
    return str(state["language_model.final_layernorm.weight"].dtype).removeprefix("torch.")


def _reference_config(reference: Path | None) -> dict[str, object] | None:
    return None if reference is None else read_json(reference / "config.json")


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
            raise ConversionError(
                f"{folder}: {' and '.join(entry.hf_names)} have different types; expected one"
            )


def _check_finite(tensor: Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ConversionError(
            f"{where} has {count} values that are not finite; the file is damaged or diverged"
        )
