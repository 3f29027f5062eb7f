"""Record the steps of a run directory: the inputs of their results, and the duration of each attempt.

``.steps/NAME.json`` holds the key of the step's current outputs, whether the step is done, and, while it runs, its
start time. ``timings.jsonl`` has a line for every attempt under that key. A killed attempt ends when its log was last
written to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

from megatron_vl.files import write_whole
from megatron_vl.report.records import StepTime


@dataclass(frozen=True)
class StepState:
    """The state of a step."""

    key: str
    """Hash of the inputs that the outputs were made from."""
    done: bool = False
    running_since: float | None = None
    """Seconds since the epoch. It is set while the step runs, and remains after an attempt that was killed."""


@dataclass(frozen=True)
class Ledger:
    """The record of one run directory."""

    run_dir: Path
    _lock: Lock = field(default_factory=Lock)
    """Held while the times are replaced: two steps may end together."""

    def log_path(self, step: str) -> Path:
        """Return the file for the output of a step's commands."""
        return self.run_dir / "logs" / f"{_file_name(step)}.log"

    def read(self, step: str) -> StepState | None:
        """Return the state of a step, or None if there is no readable record."""
        try:
            return StepState(**json.loads(self._state_path(step).read_text(encoding="utf-8")))
        except (OSError, TypeError, json.JSONDecodeError):
            return None

    def write(self, step: str, state: StepState) -> None:
        """Replace the state of a step."""
        path = self._state_path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(state)))

    def settle(self, step: str) -> None:
        """Record the time of an attempt that was killed."""
        state = self.read(step)
        if state is not None and state.running_since is not None:
            log = self.log_path(step)
            ended = log.stat().st_mtime if log.exists() else state.running_since
            seconds = max(0.0, ended - state.running_since)
            self.add_time(StepTime(step, round(seconds, 2), state.running_since, finished=False))
            self.write(step, StepState(state.key))

    def add_time(self, timing: StepTime) -> None:
        """Append an attempt."""
        with self._lock:
            self._write_times([*self.times(), timing])

    def times(self) -> list[StepTime]:
        """Return all attempts, in order."""
        if not self._timings.exists():
            return []
        lines = self._timings.read_text(encoding="utf-8").splitlines()
        return [StepTime(**json.loads(line)) for line in lines]

    def forget_times(self, step: str) -> None:
        """Remove a step's attempts: its inputs have changed, so they do not belong to this run."""
        with self._lock:
            self._write_times([timing for timing in self.times() if timing.step != step])

    def _write_times(self, times: Sequence[StepTime]) -> None:
        write_whole(self._timings, "".join(json.dumps(asdict(timing)) + "\n" for timing in times))

    @property
    def _timings(self) -> Path:
        return self.run_dir / "timings.jsonl"

    def _state_path(self, step: str) -> Path:
        return self.run_dir / ".steps" / f"{_file_name(step)}.json"


def _file_name(step: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", step.lower()).strip("_")
