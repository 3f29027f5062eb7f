"""One rank of ``planned_step.py``: what the machine reaches, and how long steps take.

torchrun --nproc-per-node SIZE benchmarks/planned_step_rank.py JOB RESULT

First each rank is a world of its own. All compute the same, each on its own core, so that they share caches and memory
as in the steps that follow. A step has the whole model in one stage. The profile of a training (``--profile`` of
``tools/train.py``) times its passes, and what is left of the step is the optimizer. Then the ranks meet. They measure
messages and collectives, and last of all the steps of each layout, in turns.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_vl.backends.platform import prepare_process

prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from audit_rank import own_images  # noqa: E402
from planned_layouts import Case, Job  # noqa: E402
from step import make_batch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_vl.config.schema import LoggingConfig, ModelConfig, RunConfig  # noqa: E402
from megatron_vl.data.loading.batch import MicroBatch  # noqa: E402
from megatron_vl.launch import Launch  # noqa: E402
from megatron_vl.parallel.topology import Topology  # noqa: E402
from megatron_vl.training.parallel_model import build_parallel_model  # noqa: E402
from megatron_vl.training.profiling import Profiler  # noqa: E402
from megatron_vl.training.step import train_step  # noqa: E402


def profile_steps(job: Job) -> dict[str, Any]:
    """Profile steps of the whole model in a world of one; return the profile, and the time beside all passes."""
    with tempfile.TemporaryDirectory() as folder, Topology(job.whole.config.parallel, Launch(0, 1, 0)) as topology:
        logging = LoggingConfig(
            profile=True,
            profile_step_start=1,
            profile_step_end=1 + job.steps,
            profile_dir=folder,
            use_pytorch_profiler=False,
        )
        config = replace(job.whole.config, logging=logging)
        model = build_parallel_model(config, topology)
        batches = [_mixed(job.whole, images, labels) for images, labels in job.mixes]
        profiler, seconds = Profiler(config, model, topology), []
        for step in range(2 + job.steps):  # a warm-up; the last step keeps this core busy until the others are done
            start = time.perf_counter()
            with profiler.step(step, batches):
                train_step(model, batches, config=config, topology=topology, step=step)
            seconds.append(time.perf_counter() - start)
        profiler.write()
        (written,) = Path(folder).iterdir()
        profile = json.loads(written.read_text())["stage_times"]
    passes = [sum(row["forward"]) + sum(row["backward"]) for row in profile["micro_batches"]]
    beside = [
        whole - sum(passes[number * len(batches) : (number + 1) * len(batches)])
        for number, whole in enumerate(seconds[1:-1])
    ]
    return {"profile": profile, "optimizer": median(beside)}


def _mixed(case: Case, images: int, labels: float) -> MicroBatch:
    """Return a row whose images are encoded, but only those of the case are shown; with other labels."""
    shown = make_batch(case.config.model, case.workload)
    assert shown.pixels is not None
    count = int(labels * shown.tokens.numel())
    return replace(
        shown,
        pixels=shown.pixels.repeat(-(-images // len(shown.pixels)), 1, 1, 1)[:images],
        num_images=images,
        supervised=torch.arange(count),
        targets=shown.tokens[:count].clone(),
    )


def kernel_rates(model: ModelConfig, length: int) -> dict[str, float]:
    """Return the operations a second of products with weights and of attention, at the sizes of the model."""
    vision, language = model.vision, model.language
    products = [
        (model.num_patches, vision.hidden_size, vision.ffn_hidden_size),
        (model.num_patches, vision.hidden_size, 3 * vision.hidden_size),
        (length, language.hidden_size, 2 * language.ffn_hidden_size),
        (length, language.hidden_size, 3 * language.hidden_size),
    ]
    seconds = operations = 0.0
    for rows, size_in, size_out in products:
        left, right = torch.randn(rows, size_in), torch.randn(size_out, size_in)
        seconds += _best(lambda left=left, right=right: F.linear(left, right))
        operations += 2 * rows * size_in * size_out
    heads = vision.num_attention_heads
    line = torch.randn(1, heads, model.num_patches, vision.hidden_size // heads)
    attention = 4 * model.num_patches**2 * vision.hidden_size
    return {
        "products": operations / seconds,
        "attention": attention / _best(lambda: F.scaled_dot_product_attention(line, line, line)),
    }


def _best(run: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def exchange_seconds(sizes: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    """Return bytes and seconds of exchanges between two ranks: of each kind in its size, and in a sixteenth of it."""
    return {
        kind: [(part, _exchange(kind, torch.zeros(part // 4))) for part in (size // 16, size)]
        for kind, size in sizes.items()
    }


def _exchange(kind: str, tensor: Tensor) -> float:
    """Return the seconds of an all-reduce; of an all-gather and a reduce-scatter; or of a message."""
    half = torch.empty(tensor.numel() // 2)

    def gather_and_scatter() -> None:
        dist.all_gather_into_tensor(tensor, half)
        dist.reduce_scatter_tensor(half, tensor)

    def there_and_back() -> None:
        me, shape = dist.get_rank(), torch.zeros(3, dtype=torch.int64)
        for sender in (0, 1):
            operation = dist.isend if me == sender else dist.irecv
            for content in (shape, tensor):  # as the schedule, which tells the shape first
                for request in dist.batch_isend_irecv([dist.P2POp(operation, content, 1 - me)]):
                    request.wait()

    runs: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(tensor),
        "gather": gather_and_scatter,
        "message": there_and_back,
        "buckets": gather_and_scatter,
    }
    dist.barrier()
    runs[kind]()
    seconds = _best(runs[kind], repeats=20 if tensor.nbytes < 8e6 else 5)
    return seconds / 2 if kind == "message" else seconds


def time_case(case: Case, topology: Topology, steps: int) -> list[float]:
    """Return the seconds of steps at a layout, after a warm-up."""
    model = build_parallel_model(case.config, topology)
    batches = [make_batch(case.config.model, case.workload) for _ in range(case.micro_batches)]
    batches = own_images(batches, case.config, topology)
    seconds = []
    for step in range(1 + steps):
        dist.barrier()
        start = time.perf_counter()
        train_step(model, batches, config=case.config, topology=topology, step=step)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    """Measure everything; rank 0 writes what it found."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - planned_step.py wrote it
    config: RunConfig = job.whole.config
    found = profile_steps(job) | kernel_rates(config.model, config.data.seq_length)
    dist.init_process_group("gloo")  # for all cases; each has its own groups
    found["exchanges"] = exchange_seconds(job.messages)
    found["steps"] = {case.name: [] for case in job.cases}
    for _ in range(job.turns):
        for case in job.cases:
            with Topology(case.config.parallel) as topology:
                found["steps"][case.name] += time_case(case, topology, job.steps)
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
