"""Read tensors one by one from untrusted files.

Three kinds of files hold each tensor's bytes uncompressed and contiguous: ``safetensors`` files, ``torch.save``
archives, and the data files of a distributed checkpoint, which are such archives one after the other. So a file is
indexed first (names, shapes, types, offsets; no data), and a tensor is then a memory map of its own byte range. Memory
is limited to the tensors that are in use, whatever the file's size. A map of the whole file would keep every page that
was touched.

No code from a file is executed. Archives are unpickled by torch's restricted unpickler (``weights_only=True``) under a
fake mode that records the offsets. The safetensors library validates the headers of its files.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vl.errors import ConversionError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor's bytes."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on disk and in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor. Its memory is a private map of its byte range of the file, and is freed with the tensor.

        Raises:
            ConversionError: if the file ends before the tensor does.
        """
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = self.offset + self.num_bytes
        with self.file.open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) < end:
                raise ConversionError(f"{self.file}: truncated; a tensor ends at byte {end}, the file at {size}")
            mapped = mmap.mmap(stream.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
        data = np.frombuffer(mapped, dtype=np.uint8, offset=self.offset - start)
        tensor = torch.from_numpy(data)
        if self.offset % self.dtype.itemsize:
            tensor = tensor.clone()  # torch views bytes as wider numbers only where they are aligned
        return tensor.view(self.dtype).reshape(self.shape)


def index_shard(file: Path) -> dict[str, StoredTensor]:
    """Return names and locations of the tensors of one shard; the file's name tells its kind.

    Raises:
        ConversionError: if the file is missing, damaged, or holds something else than float tensors by name.
    """
    if not file.is_file():
        raise ConversionError(f"{file}: no such file; download the folder again, or correct its index")
    index = _index_safetensors(file) if file.suffix == ".safetensors" else _index_archive(file)
    for name, stored in index.items():
        if stored.dtype not in DTYPES.values():
            raise ConversionError(f"{file}: {name} is {stored.dtype}; expected bfloat16, float16 or float32")
    return index


def _index_safetensors(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open  # training reads no such file

    try:
        with safe_open(file, "pt") as opened:  # validates the header: sizes, overlaps, the file's length
            names = list(opened.keys())
    except SafetensorError as error:
        raise ConversionError(f"{file}: not a sound safetensors file ({error}); download it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    index = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise ConversionError(f"{file}: {name} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        index[name] = StoredTensor(file, start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return index


def index_archive_part(file: Path, offset: int, length: int, *, name: str) -> StoredTensor:
    """Return the location of the tensor ``name``, the only content of an archive that is a part of ``file``.

    Raises:
        ConversionError: if the part is damaged, or holds something else.
    """
    with file.open("rb") as stream:
        content = _unpickle(cast(IO[bytes], _Part(stream, offset, length)), f"{file}: {name}")
    stored = _stored(name, content, file)
    return replace(stored, offset=offset + stored.offset)


class _Part(io.RawIOBase):
    """A part of an open file with the interface of a file."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _unpickle(file: Path | IO[bytes], where: str) -> object:
    """Return the content of an archive; its tensors have their location instead of data."""
    try:
        with FakeTensorMode():
            return torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConversionError(f"{where}: refused ({reason}); expected an archive of plain tensors") from error


def _index_archive(file: Path) -> dict[str, StoredTensor]:
    if not zipfile.is_zipfile(file):
        raise ConversionError(
            f"{file}: no archive of torch.save (truncated, or written by torch before 1.6); download it again"
        )
    _check_archive(file)
    content = _unpickle(file, str(file))
    if not isinstance(content, dict):
        raise ConversionError(f"{file}: holds a {type(content).__name__}; expected tensors by name")
    return {_name(name, file): _stored(name, tensor, file) for name, tensor in content.items()}


def _check_archive(file: Path) -> None:
    """Refuse archives whose bytes are not the tensors': compressed ones, and those of a big-endian machine."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            orders = {archive.read(record) for record in records if record.filename.endswith("/byteorder")}
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ConversionError(f"{file}: a damaged archive ({error}); download it again") from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or orders - {b"little"}:
        raise ConversionError(
            f"{file}: is compressed, or was written by a big-endian machine; load it with torch and save it again here"
        )


def _name(name: object, file: Path) -> str:
    if not isinstance(name, str):
        raise ConversionError(f"{file}: holds the key {name!r}; expected names of tensors")
    return name


def _stored(name: str, tensor: object, file: Path) -> StoredTensor:
    if not isinstance(tensor, Tensor):
        raise ConversionError(f"{file}: {name} is a {type(tensor).__name__}; expected a tensor")
    if not tensor.is_contiguous():
        raise ConversionError(f"{file}: {name} is stored transposed or strided; save contiguous tensors")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ConversionError(f"{file}: {name} has no data in the archive; expected a tensor with its bytes")
    start = int(offset) + int(tensor.storage_offset()) * tensor.element_size()
    return StoredTensor(file, start, tuple(tensor.shape), tensor.dtype)
