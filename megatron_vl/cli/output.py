"""Files that commands write for people: a text is there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vl.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Write a JSON text in one step, making the folder if need be; until then an older file stays.

    Half a surrogate pair, which UTF-8 does not have, is written as JSON's escape of it.

    Raises:
        DataError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"--output {path}: cannot be written ({error.strerror})") from error
