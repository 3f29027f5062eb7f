"""Write a checkpoint tensor by tensor, in one process, for models of any size.

Megatron-Core's own writer needs every tensor in memory. A conversion does not. Here each tensor is read just before it
is written, and dropped after that. While one is written, threads compute its hash and read the next one. Hashing alone
takes longer than writing.

The result is what Megatron-Core writes, since this is one of its strategies for saving. Keys, shapes and everything
that is not a tensor come from the network's own description. Each tensor is one chunk, of which a reader of any layout
takes what it needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as torch_serialization

from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.tensors import METADATA_FILE, read_ahead
from megatron_vl.files import HashedWriter, sync

_DATA_FILE = "__0_0.distcp"
_ALIGNMENT = 64
"""torch aligns a tensor's bytes within an archive; aligned archives make them readable in place."""


class StreamingStrategy(TorchDistSaveShardedStrategy):
    """Save tensors that are read one by one; for a world of one rank."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """Take ``read``, which returns the whole tensor of a key, with the global shape that the network describes."""
        super().__init__("torch_dist", 1)
        self._read = read
        self.records: list[store.FileRecord] = []
        """The files whose hashes are known already."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write every tensor and object of a sharded state dict, whose own tensors may be on the meta device."""
        entries = list(nested_values(sharded_state_dict))
        shapes = {entry.key: torch.Size(entry.global_shape) for entry in entries if isinstance(entry, ShardedTensor)}
        objects = {entry.unique_key: entry.data for entry in entries if not isinstance(entry, ShardedTensor)}
        directory = Path(checkpoint_dir)
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        with _HashedFile(directory / _DATA_FILE) as file:
            for key, tensor in read_ahead(list(shapes), self._read):
                assert tensor.shape == shapes[key], f"{key}: {tensor.shape}, the network has {shapes[key]}"
                described[key] = _describe(tensor)
                places[MetadataIndex(key, torch.Size([0] * tensor.dim()))] = file.append(tensor)
                del tensor
            for key, value in objects.items():
                described[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = file.append([value])
        self.records.append(file.record())
        metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta(checkpoint_id=str(directory)))
        with (directory / METADATA_FILE).open("wb") as stream:
            pickle.dump(metadata, stream)


class _HashedFile:
    """A file that is written item by item. Its SHA-256 is known at the end without reading it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hasher = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        self._stream = self._path.open("wb")
        self._writer = HashedWriter(self._stream, self._hasher)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        with self._stream as stream:
            sync(stream)

    def append(self, item: object) -> _StorageInfo:
        """Append an item as torch saves it, and return its place."""
        self.write(b"\0" * (-self._writer.size % _ALIGNMENT))
        start = self._writer.size
        with getattr(torch_serialization, "patch")({"save.compute_crc32": False}):  # the manifest's SHA-256 covers it
            torch.save(item, cast(IO[bytes], self))
        return _StorageInfo(self._path.name, start, self._writer.size - start)

    def write(self, data: memoryview | bytes) -> int:
        """Write data; torch calls this."""
        return self._writer.write(data)

    def flush(self) -> None:
        """Do nothing; torch calls this after each item, but the file is flushed once, at the end."""

    def record(self) -> store.FileRecord:
        """Return size and hash of the closed file."""
        return store.FileRecord(self._path.name, self._writer.size, self._writer.sha256)


def _describe(tensor: Tensor) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * tensor.dim()), sizes=tensor.shape)
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk])
