"""Profile chosen steps of a run (``--profile``): traces of chosen ranks, and the times of all stages.

What is written into the profile's directory, after the last of these steps and after a save that is due then:

* on each rank of ``profile_ranks`` a trace of torch's profiler, ``rank0_steps11-12.pt.trace.json.gz``. Its ranges are
  the step, each pass of each stage, and what Megatron-Core times itself (messages, the exchange of gradients). On CUDA
  they are NVTX ranges too, for ``nsys``, and the device is told where to begin and end (``cudaProfilerStart``);
* there too, if wanted, a snapshot of CUDA's memory with the history of its blocks, ``rank0_steps11-12.memory.pickle``;
* on rank 0 the seconds of each pass of all ranks, ``stage_times_steps11-12.json`` (``planning/stage_profile.py``).

A profile reads clocks and changes no number: there are no barriers, and no tensor is touched. If a run ends early at a
step, what was profiled so far is written. Files get their names when they are whole.

A profile never ends a run. All ranks call :meth:`Profiler.write` and tell each other what they could not write, so none
waits, the other files are written, and rank 0 warns for all.
"""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_vl import log, machine_errors
from megatron_vl.config.profile import profile_folder, profile_ranks
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.files import draft_of, whole_file, write_whole
from megatron_vl.log import log_rank_0, warn_loudly
from megatron_vl.parallel.agreement import by_all, by_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.stage_profile import MicroBatchTimes, StageProfile
from megatron_vl.training.parallel_model import ParallelModel
from megatron_vl.training.stage_times import StageClock, StagePass, TimedStep

_HISTORY = 1_000_000
"""Allocations that the history of memory keeps."""
_NAMED = 3
"""Files that a warning names."""


class Profiler:
    """The profile of a run on this rank."""

    def __init__(self, config: RunConfig, model: ParallelModel, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._trace = Trace(config) if topology.rank in profile_ranks(config) else None
        self._clock = StageClock(model, topology, self._trace.range if self._trace else _no_range)
        self._works: list[MicroBatchTimes] = []
        """What each micro-batch of this rank held, without times."""
        self._written = False

    @contextmanager
    def step(self, step: int, batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Profile a training step if it is one of the chosen; ``step`` counts from 0."""
        logging = self._config.logging
        if not logging.profile_step_start <= step < logging.profile_step_end:
            yield
            return
        if self._trace:
            self._trace.start()
        with self._clock.step(step, batches):
            yield
        self._works += [_without_times(step + 1, self._topology.dp_rank, batch) for batch in batches]

    def ends_at(self, step: int) -> bool:
        """Return whether the profile ends after so many steps."""
        return step == min(self._config.logging.profile_step_end, self._config.training.train_iters)

    def stop(self) -> None:
        """Stop recording, so that validation and save are not in the trace; safe to call twice."""
        if self._trace:
            self._trace.stop()

    def write(self) -> None:
        """Write what was profiled, once; all ranks call it. Rank 0 warns of what cannot be written."""
        steps, logging = [one.step for one in self._clock.timed], self._config.logging
        if self._written:
            return
        if not steps:
            wanted = f"{logging.profile_step_start + 1} to {logging.profile_step_end}"
            log_rank_0(f"nothing was profiled: this run has trained none of the steps {wanted}")
            return
        self._written = True
        folder, label = profile_folder(self._config), f"steps{steps[0]}-{steps[-1]}"
        failures = by_all(lambda: _failure(lambda: self._write_own(folder, label)))
        gathered = by_all(lambda: (self._topology.tp_rank, self._works, self._clock.timed))
        path = folder / f"stage_times_{label}.json"
        failures.append(by_rank_0(lambda: _failure(lambda: self._write_times(path, gathered))))
        ranks = [*range(self._topology.world_size), 0]
        faults = dict.fromkeys(f"rank {rank}: {text}" for rank, text in zip(ranks, failures, strict=True) if text)
        what = f"steps {steps[0]} to {steps[-1]}"
        if not faults:
            log_rank_0(f"profiled {what}: {folder}")
            return
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        warn_loudly(
            f"THE PROFILE OF {what.upper()} IS NOT COMPLETE: {folder} cannot be written to "
            f"({'; '.join(list(faults)[:_NAMED])}{more}); no training step is lost by it"
        )

    def _write_own(self, folder: Path, label: str) -> None:
        if self._trace:
            self._trace.stop()
            folder.mkdir(parents=True, exist_ok=True)
            self._trace.write(folder, f"rank{self._topology.rank}_{label}")

    def _write_times(self, path: Path, gathered: Sequence[tuple[int, list[MicroBatchTimes], list[TimedStep]]]) -> None:
        logging, topology = self._config.logging, self._topology
        num_stages = topology.pp_size * topology.vp_size
        profile = StageProfile(
            device=torch.cuda.get_device_name() if topology.device.type == "cuda" else "CPU",
            world_size=topology.world_size,
            traced_ranks=profile_ranks(self._config) if logging.use_pytorch_profiler else (),
            config=self._config,
            micro_batches=_join([own for tensor, *own in gathered if tensor == 0], num_stages),
            vision=tuple(one.vision for _, _, timed in gathered for one in timed if one.vision is not None),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"stage_times": asdict(profile)}) + "\n")


def _without_times(step: int, data_rank: int, batch: MicroBatch) -> MicroBatchTimes:
    work = batch.work
    return MicroBatchTimes(
        step, data_rank, batch.num_images, batch.num_tokens, work.sum_squared_spans, batch.targets.numel(), (), ()
    )


def _join(ranks: Sequence[Any], num_stages: int) -> tuple[MicroBatchTimes, ...]:
    """Return a row for each micro-batch, with the seconds that the ranks of its pipeline have measured.

    Args:
        ranks: of each rank, what its micro-batches held and its timed steps.
    """
    seconds: dict[tuple[int, int, StagePass], float] = {}
    works: dict[tuple[int, int, int], MicroBatchTimes] = {}
    for held, timed in ranks:
        data_rank, count = held[0].data_rank, len(held) // len(timed)
        for number, one in enumerate(timed):
            seconds |= {(one.step, data_rank, what): value for what, value in one.passes.items()}
            own = held[number * count : (number + 1) * count]
            works |= {(one.step, data_rank, micro_batch): work for micro_batch, work in enumerate(own)}
    rows = []
    for (step, data_rank, micro_batch), work in sorted(works.items(), key=lambda item: item[0]):
        forward, backward = (
            tuple(seconds[step, data_rank, StagePass(stage, micro_batch, back)] for stage in range(num_stages))
            for back in (False, True)
        )
        rows.append(MicroBatchTimes(**asdict(work) | {"forward": forward, "backward": backward}))
    return tuple(rows)


def _failure(write: Callable[[], None]) -> str | None:
    """Write, and return what went wrong, for any error: a profile is worth less than the run."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - rank 0 warns of it
        if (text := machine_errors.describe(error)) is not None:
            return text
        logging.getLogger(log.ROOT).warning("the profile of this rank", exc_info=error)
        return f"{type(error).__name__}: {error}"
    return None


def _no_range(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class Trace:
    """What a rank of ``profile_ranks`` records between the first and the last profiled step."""

    def __init__(self, config: RunConfig) -> None:
        self._logging = config.logging
        self._cuda = torch.cuda.is_available()
        self._profile: Any = None
        self._memory: Any = None
        self._started = self._stopped = False

    def start(self) -> None:
        """Begin to record, once."""
        if self._started:
            return
        self._started = True
        if self._logging.record_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
        if self._logging.use_pytorch_profiler:
            device = [torch.profiler.ProfilerActivity.CUDA] if self._cuda else []
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *device])
            self._profile.start()
        elif self._cuda:
            torch.cuda.profiler.start()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Name what happens in this context, for all profilers."""
        with ExitStack() as ranges:
            if self._profile is not None:
                ranges.enter_context(torch.profiler.record_function(name))
            if self._cuda:
                # Not pushed and popped: two ranges need not end in the order in which they have begun.
                ranges.callback(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))
            yield

    def stop(self) -> None:
        """Stop recording, once, if it was begun."""
        if not self._started or self._stopped:
            return
        self._stopped = True
        if self._profile is not None:
            self._profile.stop()
        elif self._cuda:
            torch.cuda.profiler.stop()
        if self._logging.record_memory_history:
            self._memory = torch.cuda.memory._snapshot()  # the next line forgets the history
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, folder: Path, name: str) -> None:
        """Write the files of what was recorded, and keep nothing of it."""
        trace, memory = self._profile, self._memory
        self._profile = self._memory = None
        if trace is not None:
            _write_trace(trace, folder / f"{name}.pt.trace.json.gz")
        if memory is not None:
            with whole_file(folder / f"{name}.memory.pickle") as draft, draft.open("wb") as file:
                pickle.dump(memory, file)


def _write_trace(profile: Any, path: Path) -> None:
    """Write a trace compressed; torch would compress by the name of the file, which a draft does not have."""
    plain = draft_of(path)
    try:
        profile.export_chrome_trace(str(plain))
        with whole_file(path) as draft, plain.open("rb") as text, gzip.open(draft, "wb", compresslevel=4) as packed:
            shutil.copyfileobj(text, packed)
    finally:
        plain.unlink(missing_ok=True)
