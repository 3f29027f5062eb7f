"""All ranks stop at the same step, whichever of them has the reason."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from megatron_vl.config.schema import ParallelConfig, TrainingConfig
from megatron_vl.errors import ExitStatus
from megatron_vl.training.stopping import Stop, StopRequest
from tests.helpers.ranks import RankPools, Start

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _reasons(start: Start, training: TrainingConfig, signalled_rank: int | None, number: int) -> list[Stop | None]:
    """The answers after steps 1 to 4; ``signalled_rank`` gets a signal after the second."""
    with start.topology(ParallelConfig()) as topology:
        before = [signal.getsignal(each) for each in SIGNALS]
        found = []
        with StopRequest(training, topology) as stop:
            for step in range(1, 5):
                if step == 3 and topology.rank == signalled_rank:
                    os.kill(os.getpid(), number)
                found.append(stop.check(step))
        assert [signal.getsignal(each) for each in SIGNALS] == before, "the handler is taken away again"
        return found


LATE = Stop("exit_duration_in_mins 0.0", ExitStatus.DONE)
INTERVAL = Stop("exit_interval 2", ExitStatus.DONE)
TERMINATED = Stop("SIGTERM", ExitStatus.STOPPED)
INTERRUPTED = Stop("Ctrl-C", ExitStatus.INTERRUPTED)


@pytest.mark.parametrize(
    ("training", "signalled_rank", "number", "expected"),
    [
        ({}, None, 0, [None] * 4),
        ({"exit_interval": 2}, None, 0, [None, INTERVAL, None, INTERVAL]),
        ({"exit_duration_in_mins": 0.0}, None, 0, [LATE] * 4),
        ({"exit_duration_in_mins": 60.0}, None, 0, [None] * 4),
        ({}, 1, signal.SIGTERM, [None, None, TERMINATED, TERMINATED]),
        ({}, 1, signal.SIGINT, [None, None, INTERRUPTED, INTERRUPTED]),
        ({"exit_interval": 4}, 1, signal.SIGTERM, [None, None, TERMINATED, TERMINATED]),
        ({"exit_duration_in_mins": 0.0}, 1, signal.SIGTERM, [LATE] * 2 + [TERMINATED] * 2),
    ],
    ids=["nothing", "interval", "too late", "in time", "SIGTERM", "Ctrl-C", "SIGTERM in interval", "SIGTERM too late"],
)
def test_reasons(
    ranks: RankPools, training: dict[str, Any], signalled_rank: int | None, number: int, expected: list[Stop | None]
) -> None:
    assert ranks(2).run(_reasons, TrainingConfig(**training), signalled_rank, number) == [expected, expected]
