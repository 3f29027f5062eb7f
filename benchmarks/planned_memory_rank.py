"""One rank of ``planned_memory.py``: the bytes of tensors that live during a training step.

torchrun --nproc-per-node SIZE benchmarks/planned_memory_rank.py JOB RESULT

Tensors are counted (``live_bytes.py``) from before the model is built. What kernels need inside a call, code, Python,
gloo's buffers and pages that were not given back are in the resident memory of the process alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vl.backends.platform import prepare_process

prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from audit_rank import own_images  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402
from planned_layouts import Case  # noqa: E402
from step import make_batch  # noqa: E402

from megatron_vl.parallel.topology import Topology  # noqa: E402
from megatron_vl.training.parallel_model import build_parallel_model  # noqa: E402
from megatron_vl.training.step import train_step  # noqa: E402

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Found:
    """Bytes of one rank."""

    pipeline_rank: int
    before: int
    """Of tensors that live before the step."""
    peak: int
    after: int
    resident: int | None
    """Growth of the resident memory from before the model to the fullest moment of the step; None without Linux."""


def run_case(case: Case, topology: Topology) -> Found:
    """Train two steps, and return what the second held."""
    _give_back()
    empty, live = _resident("VmRSS"), LiveBytes()
    with live:
        model = build_parallel_model(case.config, topology)
        batches = [make_batch(case.config.model, case.workload) for _ in range(case.micro_batches)]
        batches = own_images(batches, case.config, topology)
        for step in range(2):
            before = live.restart()
            _forget_resident_peak()
            train_step(model, batches, config=case.config, topology=topology, step=step)
    peak, resident = live.peak, _resident("VmHWM")
    growth = None if resident is None or empty is None else resident - empty
    return Found(topology.pp_rank, before, peak, live.now(), growth)


def _give_back() -> None:
    """Give the pages of earlier cases back to the system, where glibc can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(name: str) -> int | None:
    """Return a size of this process in bytes, by its name in Linux."""
    if not _STATUS.is_file():
        return None
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def _forget_resident_peak() -> None:
    """Let the peak of the resident memory begin anew."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def main() -> None:
    """Run every case in turn; rank 0 writes what all ranks found."""
    torch.set_num_threads(1)
    cases: list[Case] = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - planned_memory.py wrote it
    result: dict[str, list[dict[str, Any]]] = {}
    dist.init_process_group("gloo")  # for all cases; each has its own groups
    for case in cases:
        with Topology(case.config.parallel) as topology:
            every: list[Any] = [None] * topology.world_size
            dist.all_gather_object(every, asdict(run_case(case, topology)))
            result[case.name] = every
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
