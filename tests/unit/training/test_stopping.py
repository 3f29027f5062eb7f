"""All ranks stop at the same step, whichever of them has the reason."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from megatron_vl.config.schema import ParallelConfig, TrainingConfig
from megatron_vl.training.stopping import StopRequest
from tests.helpers.ranks import RankPools, Start


def _reasons(start: Start, training: TrainingConfig, signalled_rank: int | None) -> list[str | None]:
    """The reasons after steps 1 to 4; ``signalled_rank`` gets SIGTERM after the second."""
    with start.topology(ParallelConfig()) as topology:
        before = signal.getsignal(signal.SIGTERM)
        found = []
        with StopRequest(training, topology) as stop:
            for step in range(1, 5):
                if step == 3 and topology.rank == signalled_rank:
                    os.kill(os.getpid(), signal.SIGTERM)
                found.append(stop.reason(step))
        assert signal.getsignal(signal.SIGTERM) == before, "the handler is taken away again"
        return found


@pytest.mark.parametrize(
    ("training", "signalled_rank", "expected"),
    [
        ({}, None, [None] * 4),
        ({"exit_interval": 2}, None, [None, "exit_interval 2", None, "exit_interval 2"]),
        ({"exit_duration_in_mins": 0.0}, None, ["exit_duration_in_mins 0.0"] * 4),
        ({"exit_duration_in_mins": 60.0}, None, [None] * 4),
        ({}, 1, [None, None, "SIGTERM", "SIGTERM"]),
        ({"exit_duration_in_mins": 0.0}, 1, ["exit_duration_in_mins 0.0"] * 2 + ["SIGTERM"] * 2),
    ],
    ids=["nothing", "interval", "too late", "in time", "signal on one rank", "signal and too late"],
)
def test_reasons(
    ranks: RankPools, training: dict[str, Any], signalled_rank: int | None, expected: list[str | None]
) -> None:
    assert ranks(2).run(_reasons, TrainingConfig(**training), signalled_rank) == [expected, expected]
