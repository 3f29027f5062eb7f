"""Detection of the true kind of a file, for messages that report what was found, and of stray files among the data.

Users supply files that are not what their names say: Git LFS pointers from a clone without LFS, an error page under the
name of an archive, UTF-16 text from a Windows shell. The code does not guess what was meant. It names the kind and says
what to do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from megatron_vl.data.remote.places import scan
from megatron_vl.errors import DataError

HEAD_BYTES = 512
BYTE_ORDER_MARK = "\ufeff"
_UTF16 = "text in UTF-16, as Windows writes it; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a pointer of Git LFS and not the file itself; fetch that: git lfs pull"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32; convert it: iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (rb"\xff\xfe|\xfe\xff|[\[{\"]\0|\0[\[{\"]", _UTF16),
    (rb"\x1f\x8b", "compressed with gzip; unpack it first: gunzip"),
    (rb"BZh[1-9]", "compressed with bzip2; unpack it first: bunzip2"),
    (rb"\xfd7zXZ", "compressed with xz; unpack it first: unxz"),
    (rb"\x28\xb5\x2f\xfd", "compressed with Zstandard; unpack it first: unzstd"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"7z\xbc\xaf", "a 7z archive"),
    (rb"Rar!", "a RAR archive"),
    (rb"PAR1", "a parquet file"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"(?s).{257}ustar", "a tar archive"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "an HTML or XML page and not the file itself, an error of the download?"),
    (rb"\0{16}", "zero bytes, as a download or a copy that broke off leaves them"),
)
_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".lz4"})
_CLUTTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


def what_is(head: bytes) -> str:
    """Name the kind of a file from its first bytes, with advice; return '' if they show nothing unexpected."""
    return next((said for pattern, said in _KINDS if re.match(pattern, head)), "")


def foreign_form(path: Path, expected: str = "") -> str:
    """Return ``it is ...`` with the result of ``what_is`` for a file; '' if that is empty or equals ``expected``."""
    with path.open("rb") as stream:
        said = what_is(stream.read(HEAD_BYTES))
    return f"it is {said}" if said not in ("", expected) else ""


def holds(folder: Path) -> str:
    """Return ``; it holds a, b`` for messages about missing files."""
    names = sorted(entry.name for entry in folder.iterdir() if not is_clutter(entry.name))
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"; it holds {', '.join(names[:5])}{more}" if names else "; it is empty"


def plain_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder whose names end in one of ``suffixes``, sorted.

    Raises:
        DataError: Matching files would be ignored because they are in subfolders or are compressed.
    """
    refuse_compressed(folder, suffixes)
    for below in _folders(folder):
        if deeper := _ending_in(below, suffixes):
            where = f"{deeper[0]}: lies deeper than is looked, which is in {folder}"
            raise DataError(f"{where}; move it, or make it a source")
    return _ending_in(folder, suffixes)


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_clutter(entry.name))


def _ending_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    with scan(folder) as entries:  # there may be a million images
        named = [entry for entry in entries if entry.name.lower().endswith(suffixes)]
    return sorted(folder / entry.name for entry in named if entry.is_file() and not is_clutter(entry.name))


def refuse_compressed(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Raise DataError if the folder has a compressed file with one of ``suffixes``, which would be ignored."""
    for entry in sorted(folder.iterdir()):
        name = re.sub(r"\.t(gz|xz|bz2)$", r".tar.\1", entry.name.lower())
        stem, suffix = os.path.splitext(name)
        if suffix in _COMPRESSED and stem.endswith(suffixes) and not is_clutter(entry.name):
            raise DataError(f"{entry}: is not read; {foreign_form(entry) or 'unpack it first'}")


def is_clutter(name: str) -> bool:
    """Return whether a file, given by name or path, is one that an operating system leaves beside the data.

    These are hidden files (``._x`` and ``.DS_Store`` of macOS, ``.ipynb_checkpoints``), ``__MACOSX/`` and
    ``Thumbs.db``.
    """
    parts = PurePosixPath(name).parts
    return any(part in _CLUTTER or (part.startswith(".") and part not in (".", "..")) for part in parts)
