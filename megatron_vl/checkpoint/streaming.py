"""Writing a checkpoint tensor by tensor, in one process, however large the model.

Megatron-Core's own writer wants every tensor in memory. A conversion does not: here a tensor is read when its turn
comes and dropped when it is written. Two threads do this side by side, each with a data file of its own, whose hash it
computes as it goes: hashing alone takes longer than writing.

What is written is what Megatron-Core writes: this is one of its strategies for saving, so keys, shapes and everything
that is not a tensor come from the network's own description. Each tensor is one chunk, of which a reader of any layout
takes what it needs.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
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
from megatron_vl.checkpoint.tensors import METADATA_FILE

_NUM_FILES = 2
_ALIGNMENT = 64
"""torch aligns a tensor's bytes within an archive; aligned archives make them readable in place."""


class StreamingStrategy(SaveShardedStrategy):
    """Saves tensors that are read one by one; for a world of one rank."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """``read`` gives the whole tensor of a key, of the global shape that the network describes; threads call it."""
        super().__init__("torch_dist", 1)
        self._read = read
        self.records: list[store.FileRecord] = []
        """The files whose hashes are known already."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """They go into the same file as the tensors."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write every tensor and object of a sharded state dict, whose own tensors may be on the meta device."""
        entries = list(nested_values(sharded_state_dict))
        shapes = {entry.key: torch.Size(entry.global_shape) for entry in entries if isinstance(entry, ShardedTensor)}
        objects = {entry.unique_key: entry.data for entry in entries if not isinstance(entry, ShardedTensor)}
        directory = Path(checkpoint_dir)
        files = [_HashedFile(directory / f"__0_{number}.distcp") for number in range(_NUM_FILES)]
        with (
            getattr(torch_serialization, "patch")({"save.compute_crc32": False}),  # the manifest's SHA-256 covers it
            ThreadPoolExecutor(max_workers=_NUM_FILES) as writers,
        ):
            shares = _share_evenly(shapes, _NUM_FILES)
            for written in [writers.submit(self._write, *work, shapes) for work in zip(files, shares, strict=True)]:
                written.result()
            for key, value in objects.items():
                files[0].append(MetadataIndex(key), [value], BytesStorageMetadata())
        for file in files:
            self.records.append(file.close())
        described = {index.fqn: entry for file in files for index, entry in file.described.items()}
        places = {index: place for file in files for index, place in file.places.items()}
        metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta(checkpoint_id=str(directory)))
        with (directory / METADATA_FILE).open("wb") as stream:
            pickle.dump(metadata, stream)

    def _write(self, file: _HashedFile, keys: Sequence[str], shapes: Mapping[str, torch.Size]) -> None:
        for key in keys:
            tensor = self._read(key)
            assert tensor.shape == shapes[key], f"{key}: {tensor.shape}, the network has {shapes[key]}"
            file.append(MetadataIndex(key, torch.Size([0] * tensor.dim())), tensor, _describe(tensor))
            del tensor  # before the next one is read


class _HashedFile:
    """A data file that is written item by item and whose SHA-256 is known at the end without reading it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()
        self._stream = path.open("wb")
        self.described: dict[MetadataIndex, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def append(
        self, index: MetadataIndex, item: object, described: TensorStorageMetadata | BytesStorageMetadata
    ) -> None:
        """Add an item as torch saves it, and note where it lies."""
        self.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        start = self._stream.tell()
        torch.save(item, cast(IO[bytes], self))
        self.places[index] = _StorageInfo(self._path.name, start, self._stream.tell() - start)
        self.described[index] = described

    def write(self, data: memoryview | bytes) -> int:
        """Called by torch."""
        self._sha256.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        """Called by torch after each item; the file is flushed once, at the end."""

    def close(self) -> store.FileRecord:
        """Bring it to the disk; its size and hash."""
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        return store.FileRecord(self._path.name, self._path.stat().st_size, self._sha256.hexdigest())


def _share_evenly(shapes: Mapping[str, torch.Size], number: int) -> list[list[str]]:
    """The keys in order, cut where the elements so far pass each part of their sum."""
    total, before = sum(shape.numel() for shape in shapes.values()), 0
    shares: list[list[str]] = [[] for _ in range(number)]
    for key, shape in shapes.items():
        shares[min(number * before // max(total, 1), number - 1)].append(key)
        before += shape.numel()
    return shares


def _describe(tensor: Tensor) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * tensor.dim()), sizes=tensor.shape)
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk])
