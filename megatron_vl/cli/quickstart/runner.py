"""Run the steps that have no results yet, and show their commands and progress.

A step's key is a hash of its commands, of the recipes that they name, and of the keys of the steps that it needs. A
step that is done under its key is not run again. Outputs of another key are removed first, and so are those of an
interrupted attempt that cannot resume. So a run directory never mixes two plans, and a second start does only what is
missing.

Steps start in their order. Two may run together unless one needs the other. A training runs alone, as it uses every
core.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.cli.quickstart.ledger import Ledger, StepState
from megatron_vl.cli.quickstart.steps import Step
from megatron_vl.errors import MegatronVLError
from megatron_vl.files import sha256_of_file
from megatron_vl.report.records import StepTime
from megatron_vl.report.tables import show_duration

_PROGRESS = re.compile(r"iteration +(\d+)/ *(\d+) .*lm loss: (\S+) .*tokens/s: (\d+)")
_TAIL_LINES = 25
_SECONDS_TO_STOP = 60
_AT_ONCE = 2
_TORCHRUN = "import sys; from megatron_vl.cli.start import run; sys.exit(run('torchrun'))"
"""As ``tools/torchrun.py`` does, which leaves no temporary files."""


class StepFailed(MegatronVLError):
    """A command of a step ended with an error; the message holds the reason, or the end of its log."""


@dataclass
class Runner:
    """Runs the steps of one run directory."""

    ledger: Ledger
    root: Path
    """The checkout, where commands run."""
    say: Callable[[str], None]
    _started: float = field(default_factory=time.monotonic, init=False)
    _keys: dict[str, str] = field(default_factory=dict, init=False)
    _running: dict[Future[None], Step] = field(default_factory=dict, init=False)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list, init=False)

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps in their order. After a failure start no more, and let the one beside it end.

        Raises:
            StepFailed: for the first step that fails.
        """
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            try:
                self._run_in(pool, steps)
            except StepFailed:
                raise
            except BaseException:  # a signal, or a terminal that has gone
                _end(list(self._processes))
                raise

    def _run_in(self, pool: ThreadPoolExecutor, steps: Sequence[Step]) -> None:
        try:
            for number, step in enumerate(steps):
                needed = [other.name for other in steps[:number] if step.needs(other)]
                self._keys[step.name] = self._key(step, needed)
                self.ledger.settle(step.name)
                if self._is_done(step):
                    self.say(f"{self._clock()} {step.name}: done before")
                    continue
                while self._must_wait(step):
                    self._await_one()
                self._clear(step)
                self._running[pool.submit(self._run, step)] = step
            while self._running:
                self._await_one()
        except StepFailed:
            for other in wait(self._running).done:
                if (failure := other.exception()) is not None:
                    self.say(f"error: {failure}")
            raise

    def _must_wait(self, step: Step) -> bool:
        others = self._running.values()
        return len(others) == _AT_ONCE or any(step.needs(other) or step.trains or other.trains for other in others)

    def _await_one(self) -> None:
        """Wait until a running step ends, and raise its error."""
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for outcome in ended:
            del self._running[outcome]
            outcome.result()

    def _key(self, step: Step, needed: Sequence[str]) -> str:
        digest = hashlib.sha256(json.dumps(step.commands).encode())
        for path in step.recipes:
            digest.update(sha256_of_file(self.root / path).encode())
        for name in needed:
            digest.update(self._keys[name].encode())
        return digest.hexdigest()

    def _is_done(self, step: Step) -> bool:
        state = self.ledger.read(step.name)
        if state is None or state.key != self._keys[step.name]:
            return False
        return state.done and all(path.exists() for path in step.outputs)

    def _clear(self, step: Step) -> None:
        """Remove earlier outputs of the step unless it resumes from them, and make their folders.

        Raises:
            StepFailed: if an output exists that no step of this run has made.
        """
        state = self.ledger.read(step.name)
        foreign = [path for path in step.outputs if path.exists()] if state is None else []
        if foreign:
            raise StepFailed(f"{step.name}: {foreign[0]} is not of this run; move it away, or choose another --output")
        same = state is not None and state.key == self._keys[step.name]
        if state is not None and not same:
            self.ledger.forget_times(step.name)
        if not (same and step.resumes):
            for path in step.outputs:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        for path in step.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)

    def _run(self, step: Step) -> None:
        key = self._keys[step.name]
        began = time.time()
        self.ledger.write(step.name, StepState(key, running_since=began))
        self.say(f"{self._clock()} {step.name}")
        clock = time.monotonic()
        finished = False
        try:
            for command in step.commands:
                self._execute(step, command)
            finished = True
        finally:
            seconds = time.monotonic() - clock
            self.ledger.add_time(StepTime(step.name, round(seconds, 2), began, finished))
            self.ledger.write(step.name, StepState(key, done=finished))
        self.say(f"{self._clock()} {step.name}: finished in {show_duration(seconds)}")

    def _execute(self, step: Step, command: Sequence[str]) -> None:
        """Run one command. Show and log its standard output; log its standard error."""
        shown = shlex.join(command)
        label = "" if step.trains else f"[{step.name}] "
        self.say(f"    {label}$ {shown}")
        log = self.ledger.log_path(step.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"$ {shown}\n")
            stream.flush()
            process = subprocess.Popen(
                _resolve(command),
                cwd=self.root,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                errors="replace",
            )
            self._processes.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                self.say(f"    {label}{condense(line)}")
            process.wait()
            self._processes.remove(process)
        if process.returncode != 0:
            raise StepFailed(_explain(step, shown, process.returncode, log))

    def _clock(self) -> str:
        seconds = round(time.monotonic() - self._started)
        return f"[{seconds // 60:02d}:{seconds % 60:02d}]"


def condense(line: str) -> str:
    """Shorten a line of output for display; of a training log line keep only what a reader follows."""
    found = _PROGRESS.search(line)
    if found is None:
        return line.rstrip()
    step, last, loss, speed = found.groups()
    return f"step {step} of {last}, loss {float(loss):.3f}, {int(speed):,} tokens/s"


def _resolve(command: Sequence[str]) -> list[str]:
    """Return the command with the running interpreter in the place of ``python`` and ``torchrun``."""
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-c", _TORCHRUN]}
    return [*programs.get(command[0], [command[0]]), *command[1:]]


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ask processes to stop (a trainer then saves), and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _explain(step: Step, command: str, status: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = len(lines) - lines[::-1].index(f"$ {command}")
    errors = [line for line in lines[last:] if line.startswith("error")]
    reason = errors[:1] or lines[last:][-_TAIL_LINES:]
    head = f"{step.name}: exit status {status} of\n    {command}"
    return "\n".join([head, *reason, f"(the whole log: {log})"])
