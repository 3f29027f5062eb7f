"""Work that never ends does not keep the one that waits for it."""

from __future__ import annotations

import threading

import pytest

from megatron_vl.doctor.waiting import still_waits, within


def test_results_and_errors_are_passed_on() -> None:
    assert within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
    assert not still_waits()


def test_what_does_not_end_is_left() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.0, release.wait)
    assert still_waits()
    release.set()
