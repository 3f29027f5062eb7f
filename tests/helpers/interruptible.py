"""Children that Ctrl-C reaches, however the tests themselves were started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible_children() -> Iterator[None]:
    """Let processes that are started inside begin with the default handling of SIGINT.

    A child inherits an ignored signal, and ``nohup bash tests/run.sh &`` in a script ignores SIGINT. Python then
    installs no handler that raises KeyboardInterrupt. A handler is not inherited: ``exec`` resets it to the default.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
