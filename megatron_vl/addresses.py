"""What is an address, such as ``s3://bucket/folder``, and the refusal of addresses where only a disk will do.

Raw data may lie at addresses (``data/remote``). Everything else is on a disk: recipes, prepared data sets, checkpoints,
logs. pathlib would make the local path ``s3:/bucket`` of an address, and a command would then report, or make, a folder
of that name.
"""

from __future__ import annotations

import re
from os import PathLike

from megatron_vl.errors import ConfigError, MegatronVLError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A protocol and at least one slash, because a ``Path`` has only one left. No path on a disk is likely to begin so."""


def is_address(text: str | PathLike[str]) -> bool:
    """Return whether a text, or a local path that was made of one, names a place of another store than the disk."""
    return _ADDRESS.match(str(text)) is not None


def require_local(
    path: str | PathLike[str], where: str, advice: str, *, error: type[MegatronVLError] = ConfigError
) -> None:
    """Raise ``error`` if a path is an address. ``where`` begins the message, ``advice`` ends it."""
    if is_address(path):
        protocol, _, rest = str(path).partition(":/")
        raise error(f"{where}: {protocol}://{rest.lstrip('/')} is an address, expected a path on a disk; {advice}")
