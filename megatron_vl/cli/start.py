"""The first line of every tool. The command is imported here, so Ctrl-C during the import also ends with one line."""

from __future__ import annotations

import importlib
import sys

_INTERRUPTED = 130  # ExitStatus.INTERRUPTED, which may not be imported yet


def run(command: str) -> int:
    """Run a module of this package, and return its exit status."""
    try:
        status: int = importlib.import_module(f"megatron_vl.cli.{command}").main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    return status
