"""Why a run stops before its last step: a signal, a time limit, an interval. All ranks stop at the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from megatron_vl.config.schema import TrainingConfig
from megatron_vl.parallel.collectives import max_over_world
from megatron_vl.parallel.topology import Topology


class StopRequest:
    """Listens for SIGTERM (Slurm's and Kubernetes' notice) while it is entered, and knows the configured limits."""

    def __init__(self, training: TrainingConfig, topology: Topology) -> None:
        self._training, self._topology = training, topology
        self._started = time.monotonic()
        self._signalled = False
        self._previous: signal.Handlers | int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous if self._previous is not None else signal.SIG_DFL)

    def reason(self, step: int) -> str | None:
        """Why all ranks should stop after ``step``, or nothing. Every rank calls it and gets the same answer."""
        interval, minutes = self._training.exit_interval, self._training.exit_duration_in_mins
        if interval and step % interval == 0:
            return f"exit_interval {interval}"
        late = minutes is not None and time.monotonic() - self._started > 60.0 * minutes
        code = max_over_world(2.0 if self._signalled else float(late), device=self._topology.device)
        return {0: None, 1: f"exit_duration_in_mins {minutes}", 2: "SIGTERM"}[round(code)]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
