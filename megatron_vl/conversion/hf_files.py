"""Read untrusted folders in the published Hugging Face layout, and write complete ones.

A folder is read through its index (``pytorch_model.bin.index.json`` or ``model.safetensors.index.json``), or from a
single file without one. The index is untrusted, so it may only name files that lie directly in the folder, and it and
the shards must agree on every name.

A folder is written under a temporary name beside its destination. It is renamed when it is complete and on disk. So a
folder with the final name is always complete, and an export that fails leaves nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vl.checkpoint.tensor_files import StoredTensor, index_shard
from megatron_vl.conversion.shards import FileFormat, PlannedTensor, Shard, open_shard, plan_shards
from megatron_vl.errors import ConversionError
from megatron_vl.files import draft_of, whole_folder

_STEMS: dict[FileFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}
_MAX_JSON_BYTES = 64 * 2**20


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConversionError: if the file is missing, oversized, or no JSON object.
    """
    if not file.is_file():
        raise ConversionError(f"{file}: no such file; expected a folder in the published layout of Qwen-VL")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ConversionError(f"{file}: larger than {_MAX_JSON_BYTES} bytes; expected a small JSON file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return name and location of every tensor of a folder; read headers only.

    Raises:
        ConversionError: if there are no weights, the index points outside of the folder, or shards and index disagree.
    """
    names = [f"{stem}.{file_format}{end}" for file_format, stem in _STEMS.items() for end in ("", ".index.json")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ConversionError(
            f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or one of them + .index.json"
        )
    if len(found) > 1:
        raise ConversionError(
            f"{folder}: holds weights more than once: {' and '.join(path.name for path in found)}; keep those that you "
            "mean, and move the others away"
        )
    return _read_shards(folder, found[0]) if found[0].suffix == ".json" else index_shard(found[0])


def _read_shards(folder: Path, index_file: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index_file}: no 'weight_map'; expected the file of each tensor")
    names_of: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\\" in file:
            raise ConversionError(f"{index_file}: {name} is said to be in {file!r}; expected a file of this folder")
        names_of.setdefault(file, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(names_of):
        shard = index_shard(folder / file)
        check_names(shard, names_of[file], where=str(folder / file), what="the index says")
        tensors |= shard
    return tensors


def check_names(found: Iterable[str], expected: set[str], *, where: str, what: str) -> None:
    """Raise ConversionError, naming up to three of them, if tensors are missing or unexpected."""
    found = set(found)
    problems = [
        f"{label} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for label, names in (("lacks", expected - found), ("has the unexpected", found - expected))
        if names
    ]
    if problems:
        raise ConversionError(f"{where}: {' and '.join(problems)}, unlike {what}")


class FolderWriter:
    """Writes the files of a folder; see :func:`write_folder`."""

    def __init__(self, folder: Path, shards: Sequence[Sequence[PlannedTensor]], file_format: FileFormat) -> None:
        self._folder = folder
        self._format: FileFormat = file_format
        self._shards = shards
        self._next = (0, 0)
        """The next shard, and the next tensor within it."""
        self._shard: Shard | None = None

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write the next planned tensor."""
        number, index = self._next
        shard = self._shards[number]
        assert PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) == shard[index], f"{name} is not the next one"
        if self._shard is None:
            self._shard = open_shard(self._folder / self._file_name(number), shard, self._format)
        self._shard.add(name, tensor)
        if index + 1 < len(shard):
            self._next = (number, index + 1)
        else:
            self._shard.close()
            self._shard, self._next = None, (number + 1, 0)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.add_bytes(name, (json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n").encode())

    def add_bytes(self, name: str, content: bytes) -> None:
        """Write a file."""
        (self._folder / name).write_bytes(content)

    def copy(self, file: Path) -> None:
        """Copy a file under its own name."""
        shutil.copyfile(file, self._folder / file.name)

    def _file_name(self, number: int) -> str:
        return f"{_STEMS[self._format]}-{number + 1:05}-of-{len(self._shards):05}.{self._format}"

    def finish(self) -> None:
        """Write the index, after all tensors."""
        assert self._next == (len(self._shards), 0), "every planned tensor has been added"
        weight_map = {
            tensor.name: self._file_name(number) for number, shard in enumerate(self._shards) for tensor in shard
        }
        total = sum(tensor.num_bytes for shard in self._shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.add_json(f"{_STEMS[self._format]}.{self._format}.index.json", index)


@contextmanager
def write_folder(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    *,
    file_format: FileFormat = "safetensors",
    max_shard_bytes: int = 2 * 10**9,
) -> Iterator[FolderWriter]:
    """Yield the writer of a folder. At the end the folder is complete and on disk; after an error it does not exist.

    Args:
        folder: must not exist, or be empty.
        tensors: the arguments of the later calls of :meth:`FolderWriter.add_tensor`, in order.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder}: exists and is not empty; remove it or choose another place")
    place = folder.resolve()  # a link cannot be replaced by a folder
    if place.is_mount():
        raise ConversionError(f"{folder}: is a mount point, which cannot be replaced; choose a folder within it")
    draft = draft_of(place)
    with whole_folder(place, draft, durable=True):
        writer = FolderWriter(draft, plan_shards(tensors, max_shard_bytes), file_format)
        yield writer
        writer.finish()
