"""Transformer Engine is taken by Megatron-Core where it can be imported, and left alone where it is not installed.

One that is installed but broken, by a missing library for example, would end the import of Megatron-Core itself, for
runs too that do not use it. It is made to look absent then, before Megatron-Core is imported, and the log says so.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec

from megatron_vl.log import log_rank_0

_NAME = "transformer_engine"


def hide_broken_transformer_engine() -> None:
    """Let an installation that cannot be imported look as if there were none, for this process."""
    if find_spec(_NAME) is None:
        return
    try:
        import_module(f"{_NAME}.pytorch")
    except ImportError:
        pass  # which Megatron-Core expects
    except (OSError, RuntimeError, AssertionError) as error:
        for name in (_NAME, f"{_NAME}.pytorch"):
            sys.modules[name] = None  # type: ignore[assignment]
        log_rank_0(
            f"Transformer Engine is installed but broken, and left out ({' '.join(str(error).split())}). Install it "
            "again as in the Dockerfile, or remove it: pip uninstall transformer-engine",
            level=logging.WARNING,
        )
