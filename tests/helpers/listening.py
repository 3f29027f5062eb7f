"""What the package logs while a block runs, however its log is set up and in whatever process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vl.log import ROOT


@contextmanager
def heard(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Messages of ``level`` and above; the list grows while the block runs."""
    logger, messages = logging.getLogger(ROOT), list[str]()
    handler, before = logging.Handler(level), logger.level
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(min(level, before or logging.WARNING))
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
