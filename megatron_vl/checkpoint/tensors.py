"""Read a checkpoint's tensors one by one, in one process, without Megatron-Core, for models of any size.

torch's own reader holds a tensor three times: its bytes, the unpickled tensor, and its destination. Here the bytes are
read from their place in the file into memory of their own, at the access to the tensor.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_vl.backends.safe_metadata import MetadataUnpickler
from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.tensor_files import StoredTensor, index_archive_part
from megatron_vl.config.schema import ModelConfig
from megatron_vl.errors import CheckpointError

T = TypeVar("T")

METADATA_FILE = ".metadata"
_OPTIMIZER_PREFIX = "optimizer."


class TensorSource(Protocol):
    """Tensors by name. Each one is read at its access; its type is known before."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""


def read_ahead(names: Sequence[str], read: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Yield each name with its result of ``read``. A thread reads the next one while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = [reader.submit(read, name) for name in names[:1]]
        for index, name in enumerate(names):
            value = pending.pop().result()
            if index + 1 < len(names):
                pending.append(reader.submit(read, names[index + 1]))
            yield name, value
            del value  # at most two tensors are in memory: the caller's and the next


class CheckpointTensors(Mapping[str, Tensor]):
    """The model's tensors in a distributed checkpoint of any layout; each is read at its access."""

    def __init__(self, checkpoint: Path) -> None:
        """Open the committed checkpoint ``checkpoint``; see :func:`open_checkpoint`.

        Raises:
            CheckpointError: if its metadata cannot be read.
        """
        self._checkpoint = checkpoint
        self.model: ModelConfig = store.read_config(checkpoint).model
        path = checkpoint / METADATA_FILE
        try:
            with path.open("rb") as stream:
                metadata = MetadataUnpickler(stream).load()
        except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); the checkpoint is not usable") from error
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_OPTIMIZER_PREFIX)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._tensors[name]
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._stored(name, entry.chunks[0]).read()
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._stored(name, chunk).read()
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        return self._tensors[name].properties.dtype

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, vocabulary padding included."""
        return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in self._tensors.values())

    def _stored(self, name: str, chunk: ChunkStorageMetadata) -> StoredTensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        file = self._checkpoint / Path(place.relative_path).name
        stored = index_archive_part(file, place.offset, place.length, name=name)
        if stored.shape != tuple(chunk.sizes):
            raise CheckpointError(
                f"{file}: {name} has the shape {list(stored.shape)}; the checkpoint's metadata makes it "
                f"{list(chunk.sizes)}. The checkpoint is damaged, use another one"
            )
        return stored


def open_checkpoint(path: Path) -> CheckpointTensors:
    """Open a checkpoint, or the newest one in a directory of checkpoints, after comparing its files with the manifest.

    Raises:
        CheckpointError: if there is none, or a file is not what was written.
    """
    checkpoint = store.choose(path)
    store.verify(checkpoint)
    return CheckpointTensors(checkpoint)
