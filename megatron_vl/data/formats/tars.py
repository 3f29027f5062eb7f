"""WebDataset tars: members with the same key form one record. Nothing is unpacked to disk.

All headers of a tar are read first. Then the members are read at their positions, so the members of a record need not
be neighbors (in ``tar cf x.tar *.jpg *.txt`` none are). Memory holds one record, and some 800 bytes per record of the
tar. As in WebDataset, the key is the part of a member's base name before the first dot. A member whose name begins with
a dot (``._x`` of macOS) is ignored.

Archives are not trusted. Only regular files with a plain relative name are considered. Of those, only suffixes on the
allow-list are read, up to a size limit. Any other fault makes the record unusable and is reported in
``TarRecord.problem``: a link, a path with ``..``, a name that is not UTF-8, an oversized member, two members with one
suffix. Members with other suffixes are never opened.

A name with a second dot belongs to the key before the first dot. So ``photo.v1.jpg`` and ``photo.v2.jpg`` both belong
to ``photo``, and neither is its image. Such a group may hold what makes a record: an image and a text, or an image of a
key without another image. Then it is a record of its own with the problem ``dotted_name``.

A tar without an end-of-archive marker was truncated. The records before the end are used, and the truncation is one
more record with the problem ``truncated_tar``. The same holds for a file that is not a tar. One bad shard among
thousands must not end the preparation, but it must be counted and named.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from megatron_vl.data.file_kinds import foreign_form, is_clutter
from megatron_vl.data.remote.places import open_whole
from megatron_vl.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXT_SUFFIXES = ("txt", "json")
MEDIA_SUFFIXES = frozenset(IMAGE_SUFFIXES + TEXT_SUFFIXES)
MAX_MEMBER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TarRecord:
    """The members of one key: suffix -> bytes."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""
    """Reason why the record cannot be used; empty if it can."""
    detail: str = ""
    others: str = ""
    """Suffixes of members that were not read, for messages."""

    @property
    def image(self) -> bytes | None:
        """The encoded image, whatever its suffix is."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return self.members[suffix]
        return None


class _Member(NamedTuple):
    """Position of a member. A member with a problem is not read."""

    suffix: str
    offset: int
    size: int
    problem: str = ""
    detail: str = ""


def read_tar(path: Path) -> Iterator[TarRecord]:
    """Yield the records of a tar in the order of their first members. Raises DataError if the file is missing."""
    try:
        stream = open_whole(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected a .tar archive") from error
    with stream:
        archive = _Archive(stream)
        for key, members in archive.groups.items():
            for record in _records(key, members, archive):
                yield _judged(record, cut=bool(archive.cut) and key == archive.last_key)
    if archive.cut:
        cut = foreign_form(path, "a tar archive") or archive.cut
        yield TarRecord(path.name, problem="truncated_tar", detail=f"{path}: {cut}")


class _Archive:
    """Positions of the members of a tar, or of several concatenated tars (``cat a.tar b.tar``)."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.groups: dict[str, list[_Member]] = {}
        """The members of each key, in the order of the headers."""
        self.last_key = ""
        self.cut = ""
        """How the archive was truncated; empty if it was not."""
        self._stream = stream
        self._size = stream.seek(0, 2)
        begin: int | None = 0
        while begin is not None and not self.cut:
            stream.seek(begin)
            begin = self._index()

    def read(self, member: _Member) -> bytes | None:
        """Return the contents of a member, or None if the archive ends too early."""
        if member.offset + member.size > self._size:
            return None
        self._stream.seek(member.offset)
        return self._stream.read(member.size)

    def _index(self) -> int | None:
        """Record the members of the tar that begins here; return where the next tar begins, if there is one."""
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header in memory
                    if not info.isdir() and not is_clutter(info.name):
                        self.last_key, suffix = split_name(info.name)
                        self.groups.setdefault(self.last_key, []).append(_member(info, suffix))
                return self._behind(archive.offset)
        except tarfile.ReadError as error:
            self.cut = str(error)
            return None

    def _behind(self, offset: int) -> int | None:
        """Return the first non-empty block after the end-of-archive marker, which is at ``offset``."""
        self._stream.seek(offset)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            self.cut = f"the end-of-archive marker is missing; the file has {self._size} bytes"
            return None
        while block and not any(block):
            block = self._stream.read(tarfile.BLOCKSIZE)
        return self._stream.tell() - len(block) if block else None


def _member(info: tarfile.TarInfo, suffix: str) -> _Member:
    place = suffix, info.offset_data, info.size
    name = _printable(info.name)
    if not info.isreg() or info.issparse():
        return _Member(*place, "not_a_regular_file", name)
    if info.name.startswith("/") or ".." in info.name.split("/") or name != info.name:
        return _Member(*place, "unsafe_member_name", name)
    if suffix in MEDIA_SUFFIXES and info.size > MAX_MEMBER_BYTES:
        return _Member(*place, "member_too_large", f"{name}: {info.size} bytes")
    return _Member(*place)


def _records(key: str, members: list[_Member], archive: _Archive) -> Iterator[TarRecord]:
    """Yield the record of a key, and the records that are unusable because of a dot in their names."""
    plain = [member for member in members if "." not in member.suffix]
    dotted: dict[str, list[str]] = {}
    for member in members:
        stem, dot, suffix = member.suffix.rpartition(".")
        if dot and suffix in MEDIA_SUFFIXES:
            dotted.setdefault(stem, []).append(suffix)
    has_image = any(member.suffix in IMAGE_SUFFIXES for member in plain)
    lost = {stem: suffixes for stem, suffixes in dotted.items() if not has_image or _is_pair(suffixes)}
    if any(member.suffix in MEDIA_SUFFIXES for member in plain) or not lost:
        yield _record(key, plain, archive)
    for stem, suffixes in lost.items():
        yield TarRecord(f"{key}.{stem}", problem="dotted_name", detail=_about_dot(key, stem, suffixes))


def _is_pair(suffixes: list[str]) -> bool:
    return not {*IMAGE_SUFFIXES}.isdisjoint(suffixes) and not {*TEXT_SUFFIXES}.isdisjoint(suffixes)


def _about_dot(key: str, stem: str, suffixes: list[str]) -> str:
    return (
        f"{key}.{stem}.{{{','.join(suffixes)}}}: in a tar the key ends at the first dot, so these belong to {key!r}; "
        f"name them {key}_{stem.replace('.', '_')}.{suffixes[0]} and so on"
    )


def _record(key: str, members: list[_Member], archive: _Archive) -> TarRecord:
    """Return the record of a key from its members."""
    for member in members:
        if member.problem:
            return TarRecord(key, problem=member.problem, detail=member.detail)
    media = [member for member in members if member.suffix in MEDIA_SUFFIXES]
    if repeated := repeated_member([member.suffix for member in media]):
        return TarRecord(key, problem="duplicate_member", detail=repeated)
    contents = {member.suffix: archive.read(member) for member in media}
    others = ", ".join(sorted({member.suffix for member in members} - MEDIA_SUFFIXES))
    return TarRecord(key, {suffix: data for suffix, data in contents.items() if data is not None}, others=others)


def _judged(record: TarRecord, *, cut: bool) -> TarRecord:
    """Return the record. The last record of a truncated archive is incomplete unless it has its image and a text."""
    if not cut or record.problem or (record.image is not None and len(record.members) > 1):
        return record
    return TarRecord(record.key, problem="incomplete_record", detail="the archive ends within this record")


def repeated_member(suffixes: list[str]) -> str:
    """Return the fault of a record with these suffixes, two images or one suffix twice; empty if there is none."""
    images = [suffix for suffix in suffixes if suffix in IMAGE_SUFFIXES]
    if len(images) > 1:
        return f"{len(images)} images ({', '.join(images)}) under one key"
    twice = sorted({suffix for suffix in suffixes if suffixes.count(suffix) > 1})
    return f"{suffixes.count(twice[0])} members .{twice[0]} under one key" if twice else ""


def split_name(name: str) -> tuple[str, str]:
    """Return key and suffix of a member: the text before and after the first dot of the base name, as in WebDataset."""
    folder, slash, base = _printable(name).removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
