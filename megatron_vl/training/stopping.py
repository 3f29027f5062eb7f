"""Stop a run before its last step: a signal, a time limit, an interval. All ranks stop at the same step.

Before the first step there is nothing to save, so SIGTERM ends a process immediately.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType

from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.errors import ExitStatus
from megatron_vl.log import write_line
from megatron_vl.parallel.collectives import max_over_world
from megatron_vl.parallel.topology import Topology
from megatron_vl.training import ending

_SAME_KEY_S = 3.0
"""Signals within this time belong to one Ctrl-C: the terminal's own, and the one that torchrun forwards."""


@dataclass(frozen=True)
class Stop:
    """Why a run stops, and with which status."""

    reason: str
    status: ExitStatus


class StopRequest:
    """Handle SIGTERM (Slurm's and Kubernetes' notice) and Ctrl-C inside this context, and check the limits."""

    def __init__(self, training: TrainingConfig, topology: Topology) -> None:
        self._training, self._topology = training, topology
        self._started = time.monotonic()
        self._terminated = False
        self._interrupted: float | None = None
        """Time of the first Ctrl-C."""
        self._previous: dict[signal.Signals, signal.Handlers | int | None] = {}

    def __enter__(self) -> StopRequest:
        for number, handler in ((signal.SIGTERM, self._on_terminate), (signal.SIGINT, self._on_interrupt)):
            self._previous[number] = signal.signal(number, handler)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)

    def is_asked(self) -> bool:
        """Return whether a signal asks the run to stop. Every rank calls it and gets the same answer."""
        own = self._terminated or self._interrupted is not None
        return max_over_world(float(own), device=self._topology.device) > 0

    def check(self, step: int) -> Stop | None:
        """Return why all ranks should stop after ``step``, or None. Every rank calls it and gets the same answer."""
        interval, minutes = self._training.exit_interval, self._training.exit_duration_in_mins
        late = minutes is not None and time.monotonic() - self._started > 60.0 * minutes
        code = 3 if self._interrupted is not None else 2 if self._terminated else int(late)
        code = round(max_over_world(float(code), device=self._topology.device))
        if code == 0 and interval and step % interval == 0:
            return Stop(f"exit_interval {interval}", ExitStatus.DONE)
        return {
            0: None,
            1: Stop(f"exit_duration_in_mins {minutes}", ExitStatus.DONE),
            2: Stop("SIGTERM", ExitStatus.STOPPED),
            3: Stop("Ctrl-C", ExitStatus.INTERRUPTED),
        }[code]

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        first = self._interrupted is None
        self._interrupted = self._interrupted or time.monotonic()
        if first and self._topology.rank == 0:
            write_line("Ctrl-C: the run ends after this step and saves; press it again to end at once", error=True)
        if time.monotonic() - self._interrupted > _SAME_KEY_S:
            # Not by an exception: its handlers would wait for the other ranks.
            os._exit(ExitStatus.INTERRUPTED)


@contextmanager
def ending_at_sigterm(config: RunConfig, topology: Topology) -> Iterator[None]:
    """Let SIGTERM end this process at once, with the status and the record of a run that was stopped.

    A thread does that. The main thread may wait in a library for a rank that has ended already, and runs no handler
    then.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    wakened = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_at_sigterm, args=(reader, config, topology), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakened)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _end_at_sigterm(signals: int, config: RunConfig, topology: Topology) -> None:
    """Read the signal numbers that Python writes to a pipe, until the other end of the pipe is closed."""
    while number := os.read(signals, 1):
        if number[0] == signal.SIGTERM:
            reason = "SIGTERM before the first step"
            ending.record(config, topology, ExitStatus.STOPPED, step=None, reason=reason)
            if topology.rank == 0:
                write_line(f"{reason}: there is nothing to save", error=True)
            os._exit(ExitStatus.STOPPED)
