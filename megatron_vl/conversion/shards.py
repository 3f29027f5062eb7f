"""Write weight files tensor by tensor.

The contents of each file are planned before the first byte is written, from names, types and shapes alone. The header
of a safetensors file holds the offset of each tensor, so the file can be written as a stream. Its library would take
all tensors of a file at once and copy them. A file of ``torch.save`` is one pickle and needs its tensors together. So
it is written as soon as its last tensor is added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_vl.checkpoint.tensor_files import DTYPES

FileFormat = Literal["safetensors", "bin"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Shard(Protocol):
    """A weight file that is being written; it is complete once all of its tensors have been added, in order."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""

    def close(self) -> None:
        """Finish the file after the last tensor has been added."""


def plan_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Return tensors by file, in order; a file is above ``max_bytes`` only if it holds a single tensor."""
    shards: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def open_shard(path: Path, tensors: Sequence[PlannedTensor], file_format: FileFormat) -> Shard:
    """Begin a weight file."""
    return _SafetensorsShard(path, tensors) if file_format == "safetensors" else _TorchShard(path)


class _SafetensorsShard:
    """Eight bytes with the length of the header, the header (JSON), the tensors' bytes one after the other."""

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._stream.close()


class _TorchShard:
    """A dictionary of tensors as ``torch.save`` writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # of a view, the whole storage would be written
            tensor = tensor.clone()
        self._tensors[name] = tensor

    def close(self) -> None:
        torch.save(self._tensors, self._path)
        self._tensors = {}
