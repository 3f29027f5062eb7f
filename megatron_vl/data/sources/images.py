"""Images that a record names by path. Paths come from data files and are not trusted.

Only regular files whose real path lies under ``image_root`` are opened: no absolute paths, no ``..``, no
links that lead out, no devices or pipes, nothing above a size cap, and never an address on the network.
"""

from __future__ import annotations

import stat
from pathlib import Path

from megatron_vl.data.sample import ImageRef
from megatron_vl.errors import SkipSample

MAX_IMAGE_BYTES = 64 * 2**20


def read_image(root: Path, name: str) -> ImageRef:
    """The encoded bytes of ``root / name``; the key is ``name``. Raises SkipSample with the reason."""
    if "://" in name or name.startswith("data:"):
        raise SkipSample("image_is_url", f"{name[:80]}: images are read from {root} only, download them first")
    path = _resolve(root, name)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise SkipSample("image_not_a_file", str(path))
        if info.st_size > MAX_IMAGE_BYTES:
            raise SkipSample("image_too_large", f"{path}: {info.st_size} bytes, at most {MAX_IMAGE_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise SkipSample("missing_image", str(path)) from error
    except OSError as error:
        raise SkipSample("unreadable_file", f"{path}: {error.strerror}") from error
    if not data:
        raise SkipSample("empty_image", str(path))
    return ImageRef(name, data)


def _resolve(root: Path, name: str) -> Path:
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise SkipSample("bad_image_path", f"{name[:80]!r}: {error}") from error
    if Path(name).is_absolute() or not path.is_relative_to(base):
        raise SkipSample("image_outside_root", f"{name[:80]!r} does not lie under {root}")
    return path
