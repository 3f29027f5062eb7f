"""Run functions on gloo ranks that stay alive.

Importing Megatron-Core costs seconds a process, so ranks are started once for each world size and are then given many
calls. Each call starts and ends its own process group (through :class:`Topology`), so cases share nothing but time.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.launch import Launch

if TYPE_CHECKING:
    from megatron_vl.parallel.topology import Topology

START_S = 300
"""For the imports of all ranks, which other processes may slow down."""
TIMEOUT_S = 120


@dataclass(frozen=True)
class Start:
    """What a rank needs to meet its peers."""

    launch: Launch
    init_method: str

    def topology(self, config: ParallelConfig) -> Topology:
        """The ranks of this call laid out as ``config`` says."""
        from megatron_vl.parallel.topology import Topology

        return Topology(config, self.launch, self.init_method)


class RankError(AssertionError):
    """A call failed on a rank; the message is that rank's traceback."""


class Ranks:
    """A fixed number of processes that run a function together."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.repeats = 1
        """How often each step with asynchronous messages runs."""
        self._directory = tempfile.TemporaryDirectory()
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(start, *args)`` on every rank; returns the results in the order of ranks.

        A rank that fails leaves its peers in the middle of a collective, so all are replaced for the next call.

        Raises:
            RankError: a rank raised, died, or took longer than ``TIMEOUT_S``; longer where steps are repeated often.
        """
        if not self._processes:
            self._start()
            self._answers(START_S)
        store = str(Path(self._directory.name) / uuid.uuid4().hex)
        for pipe in self._pipes:
            pipe.send((function, store, args, self.repeats))
        return self._answers(TIMEOUT_S * max(1, self.repeats // 5))

    def _answers(self, limit: int) -> list[Any]:
        results: list[Any] = [None] * self.world_size
        waiting = dict(enumerate(self._pipes))
        deadline = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting)} of {self.world_size} did not answer in {limit} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                results[rank] = self._receive(rank, waiting.pop(rank))
        return results

    def _receive(self, rank: int, pipe: Any) -> Any:
        try:
            failed, value = pipe.recv()
        except EOFError:
            failed, value = True, "the process died"
        if failed:
            self._fail(f"rank {rank} of {self.world_size}:\n{value}")
        return value

    def _fail(self, message: str) -> None:
        self.stop()
        raise RankError(message)

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, world_size: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.checkpoint import contents  # noqa: F401 - nearly every call needs what this imports
    from megatron_vl.training import step  # noqa: F401
    from tests.helpers.repeats import repeated_schedules

    gc.collect()
    gc.freeze()  # each call ends with a collection, which then looks at the objects of that call alone
    pipe.send((False, None))  # ready
    while True:
        function, store, args, repeats = pipe.recv()
        start = Start(Launch(rank, world_size, rank), f"file://{store}")
        try:
            with repeated_schedules(repeats):
                result = function(start, *args)
            pipe.send((False, result))
        except BaseException:  # noqa: BLE001 - torch's CheckpointException is a BaseException; the test must see it
            pipe.send((True, traceback.format_exc()))


class RankPools:
    """One :class:`Ranks` for each world size that was asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}
        self.repeats = 1
        """How often each step with asynchronous messages runs, in calls from now on."""

    def __call__(self, world_size: int) -> Ranks:
        pool = self._pools.setdefault(world_size, Ranks(world_size))
        pool.repeats = self.repeats
        return pool

    def stop(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.stop()
