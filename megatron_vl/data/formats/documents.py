"""Many small documents in folders, or in the zip archives of published crawls; a few documents per unit of work.

Archives are read in place. Documents are not trusted. In a folder, only regular files are read, never links. Files
above a size limit are not read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.file_kinds import is_clutter
from megatron_vl.data.formats.shard import Shard, Skipped, hash_of_files, skipped, unreadable
from megatron_vl.data.formats.zips import check_zip, list_members, read_member
from megatron_vl.errors import DataError, SkipSample

MAX_DOCUMENT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """The bytes of a document and the name under which it was found."""

    key: str
    data: bytes
    content_type: str = "text/html"
    """Content type as reported by the server (pages of a crawl)."""


def document_shards(
    path: Path, suffixes: tuple[str, ...], documents_per_shard: int, whole: tuple[str, ...] = ()
) -> list[Shard]:
    """Return shards of the documents of a folder and its subfolders, of the zips in it, or of one zip or document.

    A file that ends in one of ``whole`` holds many documents and is a shard of its own.

    Raises:
        DataError: There is no document.
    """
    if documents_per_shard < 1:
        raise DataError(f"records_per_shard is {documents_per_shard}, expected at least 1")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {' or '.join(suffixes)} files, or zips of them")
    root = path if path.is_dir() else path.parent
    archives = _files(path, (".zip",))
    for archive in archives:
        check_zip(archive)
    places = archives if path.suffix == ".zip" or path.name.endswith(whole) else [path, *archives]
    shards = []
    for place in places:
        documents = _documents(place, suffixes)
        for first in range(0, len(documents), documents_per_shard):
            mine = documents[first : first + documents_per_shard]
            contents = hash_of_files(mine) if place.is_dir() else ""
            shards.append(Shard(f"{place.relative_to(root)}:{first}", place, first, len(mine), contents=contents))
    shards += [Shard(str(file.relative_to(root)), file) for file in _files(path, whole)]
    if not shards:
        raise DataError(f"{path}: no {' or '.join((*suffixes, *whole))} file, and no zip of them")
    return shards


def read_documents(shard: Shard, suffixes: tuple[str, ...]) -> Iterator[Document | Skipped]:
    """Yield the documents of a shard, with ``Skipped`` for those that cannot be read."""
    last = None if shard.count is None else shard.first + shard.count
    for name, file in _documents(shard.path, suffixes)[shard.first : last]:
        key = name if shard.path.suffix != ".zip" else f"{shard.path.name}/{name}"
        try:
            if shard.path.suffix == ".zip":
                yield Document(key, read_member(shard.path, name, MAX_DOCUMENT_BYTES))
            else:
                yield Document(key, _read_file(file))
        except SkipSample as error:
            yield skipped(key, error)


def _documents(place: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return name and path of each document of a folder, an archive or a single file, sorted."""
    if place.suffix == ".zip":
        return [(name, place) for name in list_members(place, suffixes)]
    if place.is_file():
        return [(place.name, place)]
    return [(file.relative_to(place).as_posix(), file) for file in _files(place, suffixes)]


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return regular files (no links) with one of ``suffixes``, sorted: ``path`` itself, or all files below it."""
    files = [path] if path.is_file() else path.rglob("*")
    wanted = (file for file in files if file.name.lower().endswith(suffixes))
    plain = (file for file in wanted if file.is_file() and not file.is_symlink())
    return sorted(file for file in plain if file == path or not is_clutter(file.relative_to(path).as_posix()))


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise SkipSample("document_too_large", f"{path}: {size} bytes, at most {MAX_DOCUMENT_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from error
