"""The first line of every tool. The command is imported here, so Ctrl-C during the import also ends with one line."""

from __future__ import annotations

import importlib
import sys

_INTERRUPTED, _USER_ERROR = 130, 2  # as ExitStatus, which may not be imported yet


def run(command: str) -> int:
    """Run a module of this package, and return its exit status."""
    try:
        status: int = importlib.import_module(f"megatron_vl.cli.{command}").main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "megatron_vl").startswith("megatron_vl"):
            raise
        sys.stderr.write(
            f"error: Python's package {error.name} is not installed for {sys.executable}: activate the environment of "
            "examples/quickstart.sh (source .venv/bin/activate), or install what setup.py lists\n"
        )
        return _USER_ERROR
    return status
