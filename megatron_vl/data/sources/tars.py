"""WebDataset tars, streamed: members that share a key become one record; nothing is ever unpacked to disk.

Archives are not trusted. Only regular files with a plain relative name are looked at; of those, only the
suffixes on the allow-list are read, and no more bytes than the cap. Everything else about a record (a link, a
path with ``..``, a name that is no UTF-8, an oversized member) makes the record unusable and is said in
``TarRecord.problem``. Members with other suffixes are never opened.

A tar that ends before its end-of-archive marker was cut off: the records before the cut are good, and the cut
itself is one more record with the problem ``truncated_tar``. So is a file that is no tar at all: one bad
shard among thousands must not end the preparation, but it must be counted and named.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_vl.data.sources.base import Shard
from megatron_vl.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
MAX_MEMBER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TarRecord:
    """The members of one key: suffix -> bytes."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""
    """Reason why the record cannot be used, empty if it can."""
    detail: str = ""

    @property
    def image(self) -> bytes | None:
        """The encoded image, whatever its suffix claims to be."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return self.members[suffix]
        return None


def tar_shards(path: Path) -> list[Shard]:
    """One shard for each ``*.tar`` of a folder (not below it), or for the file itself; raises DataError."""
    if path.is_file():
        return [Shard(path.name, path)]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected a .tar file or a folder of them")
    files = sorted(file for file in path.glob("*.tar") if file.is_file())
    if not files:
        raise DataError(f"{path}: no .tar file in this folder; expected img2dataset's webdataset output")
    return [Shard(file.name, file) for file in files]


def read_tar(path: Path) -> Iterator[TarRecord]:
    """Records of a tar in its order; raises DataError if there is no such file."""
    record: TarRecord | None = None
    cut = ""
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in _members(archive):
                key, _ = split_name(member.name)
                if record is None or record.key != key:
                    if record is not None:
                        yield record
                    record = TarRecord(key)
                record = _add(record, archive, member)
            cut = _missing_marker(stream, archive.offset)
    except tarfile.ReadError as error:
        cut = str(error)
        record = _without_last(record) if record is not None else None
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected a .tar archive") from error
    if record is not None and (record.members or record.problem):
        yield record
    if cut:
        yield TarRecord(path.name, problem="truncated_tar", detail=f"{path}: {cut}")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header; a shard may have millions
        if not member.isdir():
            yield member


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: what is before and behind the first dot of the last component, as WebDataset
    has it."""
    folder, slash, base = _printable(name).removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _add(record: TarRecord, archive: tarfile.TarFile, member: tarfile.TarInfo) -> TarRecord:
    if record.problem:
        return record
    problem = _problem(member)
    if problem:
        return replace(record, problem=problem, detail=_printable(member.name))
    _, suffix = split_name(member.name)
    if suffix not in IMAGE_SUFFIXES + TEXT_SUFFIXES:
        return record
    if member.size > MAX_MEMBER_BYTES:
        return replace(record, problem="member_too_large", detail=f"{member.name}: {member.size} bytes")
    stream = archive.extractfile(member)
    assert stream is not None, "regular files have contents"
    data = stream.read()
    return replace(record, members={**record.members, suffix: data})


def _problem(member: tarfile.TarInfo) -> str:
    if not member.isreg():
        return "not_a_regular_file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe_member_name"
    try:
        member.name.encode("utf-8")
    except UnicodeEncodeError:
        return "unsafe_member_name"
    return ""


def _without_last(record: TarRecord) -> TarRecord:
    """A record that may be incomplete: with its image and a text it stays, otherwise it is marked."""
    if record.image is not None and len(record.members) > 1:
        return record
    return replace(record, problem="incomplete_record", detail="the archive ends within this record")


def _missing_marker(stream: BinaryIO, offset: int) -> str:
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and not any(block):
        return ""
    return f"the end-of-archive marker is missing; the file has {stream.seek(0, 2)} bytes"
