"""The first line of every tool. The command is imported here, so Ctrl-C during the import also ends with one line."""

from __future__ import annotations

import importlib
import importlib.util
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
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:  # it is there, and lacks a module
            raise
        sys.stderr.write(
            f"error: Python's package {package} is not installed for {sys.executable}: activate the environment of "
            "examples/quickstart.sh (source .venv/bin/activate), or install what setup.py lists\n"
        )
        return _USER_ERROR
    return status
