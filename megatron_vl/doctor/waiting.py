"""Wait for work that may never end, in a thread that the rest of the process does not depend on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_NAME = "may never end"


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return the result of an action, or raise its error.

    Raises:
        TimeoutError: if it has not ended after so many seconds. Its thread then still waits.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def still_waits() -> bool:
    """Return whether such work has not ended. Then nothing but the end of the process ends it."""
    return any(thread.name == _NAME for thread in threading.enumerate())
