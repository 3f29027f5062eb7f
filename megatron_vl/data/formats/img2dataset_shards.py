"""Image-text pairs from the containers that img2dataset writes: tars, folders and parquet, one record at a time.

    NAME/00000.tar        KEY.jpg KEY.txt KEY.json, KEY.jpg ...    output_format=webdataset
    NAME/00000/           KEY.jpg KEY.txt KEY.json, KEY.jpg ...    output_format=files
    NAME/00000.parquet    a column of images, txt, and the json's columns        parquet; or Hugging Face's images

In all three, a pair is the encoded image and the fields of its metadata, including the ``txt``. Keys have gaps and no
order, and ``txt`` or ``json`` may be missing. In a folder, the key is the file name without its suffix. In a tar, the
key is the text before the first dot. Tars and folders also have parquet files beside them, which list all addresses and
hold no images. So parquet is not read if there are tars or folders.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.file_kinds import foreign_form, holds, is_clutter, refuse_compressed
from megatron_vl.data.formats.image_files import read_bytes
from megatron_vl.data.formats.parquet import IMAGE_STRUCT, read_rows, require_images_in
from megatron_vl.data.formats.shard import Shard, Skipped, hash_of_files, skipped
from megatron_vl.data.formats.tars import IMAGE_SUFFIXES, MEDIA_SUFFIXES, TarRecord, read_tar, repeated_member
from megatron_vl.data.formats.values import decode_text
from megatron_vl.errors import DataError, SkipSample


@dataclass(frozen=True)
class Pair:
    """An encoded image (not empty) and its metadata."""

    key: str
    """The name of the shard and the key in it, because bare keys repeat between shards of different data sets."""
    image: bytes
    fields: Mapping[str, Any]
    """The fields of the json, and the caption file under ``txt``."""


def pair_shards(path: Path) -> list[Shard]:
    """Return a shard for each tar, folder or parquet file of a folder, or for the file itself. Raises DataError."""
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path}: no such file or folder; expected img2dataset's output or one of its shards")
    found = _shards_in(path) if path.is_dir() else [path]
    for item in found[:1]:
        if item.suffix == ".parquet":
            require_images_in(item, IMAGE_SUFFIXES)
        elif item.is_file() and not item.name.endswith((".tar", ".parquet")):
            said = foreign_form(item)
            raise DataError(f"{item}: expected a .tar, a .parquet or a folder{'; ' if said else ''}{said}")
    return [Shard(item.name, item, contents=_state_of_texts(item) if item.is_dir() else "") for item in found]


def _state_of_texts(folder: Path) -> str:
    """Return a hash that changes with the names of all files of a folder, and with what describes the images.

    The images are not asked one by one, as for every other source.
    """
    entries = sorted(entry for entry in folder.iterdir() if not is_clutter(entry.name))
    texts = [(entry.name, entry) for entry in entries if _split(entry.name)[1] in ("txt", "json")]
    names = hashlib.sha256("\n".join(entry.name for entry in entries).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{names[:32]} {hash_of_files(texts)}"


def _shards_in(path: Path) -> list[Path]:
    entries = sorted(entry for entry in path.iterdir() if not is_clutter(entry.name))
    refuse_compressed(path, (".tar", ".parquet"))
    tars = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    folders = []
    for entry in entries:
        if not entry.is_dir():
            continue
        if _has_image(entry):
            folders.append(entry)
        elif deeper := _first_shard_below(entry):
            raise DataError(
                f"{deeper}: lies deeper than is looked, which is in {path} and in the folders of images in it; move "
                "it, or make a source of its folder"
            )
    if _has_image(path):
        folders.insert(0, path)
    if tars and folders:
        raise DataError(f"{path}: both tars and folders of images ({folders[0].name}); move either elsewhere")
    found = tars or folders or [entry for entry in entries if entry.suffix == ".parquet" and entry.is_file()]
    if not found:
        raise DataError(
            f"{path}: no .tar, no .parquet and no folder of images (.{', .'.join(IMAGE_SUFFIXES)}){holds(path)}"
        )
    return found


def read_pairs(shard: Shard) -> Iterator[Pair | Skipped]:
    """Yield the pairs of a shard, with ``Skipped`` for records that are not pairs."""
    if shard.path.suffix == ".parquet":
        yield from (_pair_of_row(shard, row) for row in read_rows(shard.path, IMAGE_SUFFIXES))
        return
    for record in _read_folder(shard.path) if shard.path.is_dir() else read_tar(shard.path):
        key = f"{shard.name}/{record.key}"
        try:
            yield Pair(key, record_image(record), record_fields(record))
        except SkipSample as error:
            yield skipped(key, error)


def record_image(record: TarRecord) -> bytes:
    """Return the image of a record. Raises SkipSample if the record has a problem, no image, or an empty image."""
    if record.problem:
        raise SkipSample(record.problem, record.detail)
    if record.image is None:
        others = f", not read: {record.others}" if record.others else ""
        raise SkipSample("no_image", f"members: {sorted(record.members)}{others}")
    if not record.image:
        raise SkipSample("empty_image", "zero bytes")
    return record.image


def record_fields(record: TarRecord) -> dict[str, Any]:
    """Return the object in the record's .json, with its .txt added. Raises SkipSample."""
    fields: dict[str, Any] = {}
    if "json" in record.members:
        try:
            fields = json.loads(decode_text(record.members["json"], "json"))
        except (ValueError, RecursionError) as error:
            raise SkipSample("bad_json", str(error)) from error
        if not isinstance(fields, dict):
            raise SkipSample("bad_json", f"expected an object, found {type(fields).__name__}")
    if "txt" in record.members:
        fields["txt"] = decode_text(record.members["txt"], "txt")
    return fields


def _has_image(folder: Path) -> bool:
    return any(_split(entry.name)[1] in IMAGE_SUFFIXES and not is_clutter(entry.name) for entry in folder.iterdir())


def _first_shard_below(folder: Path) -> Path | None:
    """Return an image or a shard somewhere below a folder without images."""
    suffixes = {"tar", "parquet", *IMAGE_SUFFIXES}
    files = (file for file in sorted(folder.rglob("*")) if _split(file.name)[1] in suffixes)
    return next((file for file in files if not is_clutter(file.relative_to(folder).as_posix())), None)


def _split(name: str) -> tuple[str, str]:
    """Return the key and the suffix of a file in a folder."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix.removeprefix(".").lower()


def _read_folder(folder: Path) -> Iterator[TarRecord]:
    """Yield the records of a folder by key. The names of all its files are held in memory."""
    names = (entry.name for entry in folder.iterdir() if not is_clutter(entry.name))
    members = sorted((*_split(name), name) for name in names)
    for key, group in itertools.groupby(members, key=lambda member: member[0]):
        everything = list(group)
        mine = [member for member in everything if member[1] in MEDIA_SUFFIXES]
        others = ", ".join(sorted(suffix for _, suffix, _ in everything if suffix not in MEDIA_SUFFIXES))
        if not mine:
            continue
        try:
            if repeated := repeated_member([suffix for _, suffix, _ in mine]):
                raise SkipSample("duplicate_member", repeated)
            yield TarRecord(key, {suffix: read_bytes(folder, name) for _, suffix, name in mine}, others=others)
        except SkipSample as error:
            yield TarRecord(key, problem=error.reason, detail=error.detail)


def _is_image_struct(value: Any) -> bool:
    """Return whether a value is an image as Hugging Face's datasets stores it."""
    return isinstance(value, Mapping) and value.keys() == IMAGE_STRUCT


def _pair_of_row(shard: Shard, row: Mapping[str, Any] | Skipped) -> Pair | Skipped:
    if isinstance(row, Skipped):
        return row
    key = f"{shard.name}/{row['key']}"
    images = [value for name, value in row.items() if name in IMAGE_SUFFIXES and value is not None]
    images += [value for name, value in row.items() if name not in IMAGE_SUFFIXES and _is_image_struct(value)]
    if len(images) > 1:
        return Skipped(key, "duplicate_member", f"{len(images)} images in one row")
    data: Any = images[0] if images else None
    if _is_image_struct(data):
        if data["bytes"] is None and data["path"]:
            return Skipped(key, "not_downloaded", f"only the path {data['path']!r:.60}; store the bytes in the parquet")
        data = data["bytes"]
    if data is None:
        return Skipped(key, "not_downloaded", f"{row.get('status')}: {row.get('error_message')}")
    if not isinstance(data, bytes):
        return Skipped(key, "wrong_field", f"the image is {type(data).__name__}")
    if not data:
        return Skipped(key, "empty_image", "zero bytes")
    return Pair(key, data, row)
