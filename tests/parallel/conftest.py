"""Every test here runs with its asynchronous steps repeated, and once more, as ``long``, beside a loop on every core.

``tests/helpers/repeats.py`` says what a repetition is; a test need not know of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.ranks import RankPools

QUIET, BUSY = 3, 30


@pytest.fixture(
    autouse=True, params=[pytest.param(QUIET, id="quiet"), pytest.param(BUSY, id="busy", marks=pytest.mark.long)]
)
def load(request: pytest.FixtureRequest, ranks: RankPools) -> Iterator[None]:
    """How often a step runs, and what else the machine has to do meanwhile."""
    ranks.repeats = request.param
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
        if request.param == BUSY
    ]
    try:
        yield
    finally:
        ranks.repeats = 1
        for process in others:
            process.kill()
            process.wait()
