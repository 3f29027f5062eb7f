"""Images that a record names by path. Paths come from data files and are not trusted.

Only regular files whose real path lies under ``image_root`` are opened. Other absolute paths, ``..``, links out of the
root, devices, pipes, files above a size limit and network addresses are refused. The root, or a part of a name, may be
a zip archive (:mod:`megatron_vl.data.formats.zips`). It is read in place under the same rules.
"""

from __future__ import annotations

import os
import stat
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.data.formats.shard import unreadable
from megatron_vl.data.formats.zips import check_zip, read_member, split_zip
from megatron_vl.data.remote.address import Address
from megatron_vl.data.remote.places import below
from megatron_vl.data.sample import ImageRef
from megatron_vl.errors import DataError, SkipSample

MAX_IMAGE_BYTES = 64 * 2**20


def require_images(root: Path) -> Path:
    """Return ``root``. Raises DataError if it is neither a folder nor leads into a zip archive."""
    inside = split_zip(root)
    if inside is not None:
        check_zip(inside[0])
    elif not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected the folder, or the .zip, of the images (image_root)"
            f"{_unpacked_instead(root)}"
        )
    return root


def _unpacked_instead(root: Path) -> str:
    """Return a hint for a missing zip whose contents are unpacked, in a folder of its name or beside it."""
    for archive in (root, *root.parents):
        if archive.suffix.lower() == ".zip":
            inside = root.relative_to(archive)
            for folder in (archive.with_suffix("") / inside, archive.parent / inside):
                if folder != archive.parent and folder.is_dir():
                    return f". There is no {archive.name}, but the folder {folder}: let image_root name that"
    return ""


def check_patterns(patterns: Sequence[str], where: str) -> None:
    """Raise DataError, beginning with ``where``, unless every pattern names fields like 'images/{id:012d}.jpg'."""
    for pattern in patterns:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        except ValueError as error:
            raise DataError(f"{where}: image_pattern {pattern!r}: {error}") from error
        if not names or not all(name.isidentifier() for name in names):
            raise DataError(
                f"{where}: image_pattern {pattern!r} names no field of a record; "
                "expected for example 'train2014/COCO_train2014_{image_id:012d}.jpg'"
            )


def image_names(patterns: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """Return the names that the patterns produce from the fields of a record.

    Raises:
        SkipSample: A field is missing or has another type.
    """
    plain = {name: _plain(value) for name, value in record.items()}
    values = {name: value for name, value in plain.items() if type(value) in (int, str)}
    try:
        return [_Names().vformat(pattern, (), values) for pattern in patterns]
    except KeyError as error:
        name = error.args[0]
        if name in record:
            detail = f"{name!r}, for the image's name, is {record[name]!r:.40}"
            raise SkipSample("wrong_field", f"{detail}, expected a text or a whole number") from error
        found = sorted(values)[:8]
        raise SkipSample("missing_field", f"no {name!r} for the image's name (image_pattern); found {found}") from error
    except ValueError as error:
        raise SkipSample("wrong_field", f"the image's name {' or '.join(patterns)}: {error}") from error


class _Names(string.Formatter):
    """Formatter that accepts a number given as text for ``{id:012d}``."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        is_digits = isinstance(value, str) and format_spec.endswith("d") and value.isascii() and value.isdigit()
        return super().format_field(int(value) if is_digits else value, format_spec)


def _plain(value: Any) -> Any:
    """Return an integral float as an integer; tables of integers with gaps store 42 as 42.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_image(root: Path, name: str, declared: tuple[int, int] | None = None) -> ImageRef:
    """Return the encoded bytes of ``root / name`` under the key ``name``.

    ``declared``: width and height according to the record.

    Raises:
        SkipSample: The image cannot be read; the reason says why.
    """
    data = read_bytes(root, name)
    if not data:
        raise SkipSample("empty_image", f"{root / name}")
    return ImageRef(name, data, declared)


def read_first_image(root: Path, names: Sequence[str], declared: tuple[int, int] | None = None) -> ImageRef:
    """Return the first of ``names`` that exists, as ``read_image`` does. Raises SkipSample('missing_image')."""
    for name in names:
        try:
            return read_image(root, name, declared)
        except SkipSample as error:
            if error.reason != "missing_image":
                raise
    raise SkipSample("missing_image", f"{root}: none of {', '.join(names)}")


def read_bytes(root: Path, name: str) -> bytes:
    """Return the bytes of ``root / name`` under the rules above. Raises SkipSample with the reason."""
    if isinstance(root, Address):
        name = name.removeprefix(f"{root}/")
    if "://" in name or name.startswith("data:"):
        raise SkipSample("image_is_url", f"{name[:80]}: images are read from {root} only, download them first")
    path = _resolve(root, name)
    try:
        if isinstance(path, Address) and split_zip(path) is not None:  # every question in vain is a request
            raise FileNotFoundError
        return _read_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = split_zip(path)
        if inside is None and (other := _other_spelling(root, name)):
            return read_bytes(root, other)
        if inside is None:
            hint = "; its name has backslashes, as on Windows, expected /" if "\\" in name else ""
            raise SkipSample("missing_image", f"{path}{hint}") from error
    except OSError as error:
        raise unreadable(str(path), error) from error
    try:
        return read_member(*inside, MAX_IMAGE_BYTES)
    except FileNotFoundError as error:
        raise SkipSample("missing_image", str(path)) from error


def _other_spelling(root: Path, name: str) -> str:
    """Return the name with composed or decomposed accents if a file has it; macOS decomposes names."""
    for form in () if name.isascii() else ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and (root / other).exists():
            return other
    return ""


def _read_file(path: Path) -> bytes:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise SkipSample("image_not_a_file", str(path))
    if info.st_size > MAX_IMAGE_BYTES:
        raise SkipSample("image_too_large", f"{path}: {info.st_size} bytes, at most {MAX_IMAGE_BYTES}")
    return path.read_bytes()


def _resolve(root: Path, name: str) -> Path:
    """Return the real path of ``root / name``. Every image passes here, and ``Path`` is half as fast as ``os.path``."""
    if isinstance(root, Address):
        found = below(root, name)
        if found is None:
            raise SkipSample("image_outside_root", f"{name[:80]!r} does not lie under {root}")
        return found
    try:
        base = os.path.realpath(root)
        path = os.path.realpath(os.path.join(base, name))
    except (OSError, ValueError) as error:
        raise SkipSample("bad_image_path", f"{name[:80]!r}: {error}") from error
    if not path.startswith(os.path.join(base, "")):
        hint = "; where it was made images lay elsewhere: take the front off" if os.path.isabs(name) else ""
        raise SkipSample("image_outside_root", f"{name[:80]!r} does not lie under {root}{hint}")
    return Path(path)
