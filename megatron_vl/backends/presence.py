"""Hide packages that cannot work here from Megatron-Core.

Megatron-Core uses Transformer Engine and Apex wherever they can be imported, and does without them otherwise. Two
installations must therefore seem absent, before Megatron-Core is imported:

* where there is no CUDA device, both: their optimizers and norms of gradients have no code for the CPU. NVIDIA's image
  on a machine without GPU is such a place;
* a broken Transformer Engine, with a missing library for example. It would end the import of Megatron-Core itself, even
  for runs that do not use it. The log reports that.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_vl.log import log_rank_0

_TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine.pytorch")
_APEX = ("apex", "amp_C")


def hide_unusable_packages() -> None:
    """Make packages that cannot work here seem absent, for this process."""
    if not torch.cuda.is_available():
        _hide(*_TRANSFORMER_ENGINE, *_APEX)
    elif find_spec(_TRANSFORMER_ENGINE[0]) is not None:
        _hide_if_broken()


def _hide(*names: str) -> None:
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]


def _hide_if_broken() -> None:
    try:
        import_module(_TRANSFORMER_ENGINE[1])
    except ImportError:
        pass  # which Megatron-Core expects
    except (OSError, RuntimeError, AssertionError) as error:
        _hide(*_TRANSFORMER_ENGINE)
        log_rank_0(
            f"Transformer Engine is installed but broken, and left out ({' '.join(str(error).split())}). Install it "
            "again as in the Dockerfile, or remove it: pip uninstall transformer-engine",
            level=logging.WARNING,
        )
