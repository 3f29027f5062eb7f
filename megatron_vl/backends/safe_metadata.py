"""Read a distributed checkpoint without running code from it.

torch reads a checkpoint's ``.metadata`` with a plain unpickler, and byte items with ``weights_only=False``. Both run
any code in a hostile file. Here the first may name only the records that metadata consists of, and the second only what
torch's restricted unpickler allows.
"""

from __future__ import annotations

import enum
import io
import pickle
from typing import Any

import torch

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the records of checkpoint metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the named record. Raises UnpicklingError for any other name."""
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata; the file is not read")


def _enum_member(kind: object, name: str) -> enum.Enum:
    """Replace ``getattr``, by which Python before 3.11.4 pickles the members of enumerations."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"{name!r} of {kind!r} has no place in a checkpoint's metadata; the file is not read")


def install() -> None:
    """Make torch's readers of distributed checkpoints use the restricted unpickler, in this process."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    def read_metadata(self: Any, *_args: Any, **kwargs: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata = MetadataUnpickler(stream).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    plain = DefaultLoadPlanner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for anything that would run code
        value.seek(0)
        plain(self, read_item, value)

    setattr(FileSystemReader, "read_metadata", read_metadata)
    if plain.__module__ != __name__:  # not installed before
        setattr(DefaultLoadPlanner, "load_bytes", load_bytes)
