"""Hide a broken Transformer Engine from Megatron-Core.

Megatron-Core uses Transformer Engine if it can be imported, and does without it if it is not installed. A broken
installation, with a missing library for example, would end the import of Megatron-Core itself, even for runs that do
not use it. So it is made to seem absent before Megatron-Core is imported, and the log reports that.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec

from megatron_vl.log import log_rank_0

_NAME = "transformer_engine"


def hide_broken_transformer_engine() -> None:
    """Make an installation that cannot be imported seem absent, for this process."""
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
