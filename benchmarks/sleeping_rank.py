"""One pipeline rank of ``sleeping.py``: Megatron-Core's schedule over stages that sleep.

torchrun --nproc-per-node SIZE benchmarks/sleeping_rank.py JOB RESULT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vl.backends.platform import prepare_process

prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from sleeping import Case, SleptStep  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_vl.config.schema import ParallelConfig, RunConfig  # noqa: E402
from megatron_vl.model.configs import Target, core_configs  # noqa: E402
from megatron_vl.parallel.schedule import P2P  # noqa: E402
from megatron_vl.parallel.topology import Topology  # noqa: E402


class _Diary:
    """When this process began and ended each pass."""

    def __init__(self) -> None:
        self.passes: list[tuple[float, float]] = []

    def sleep(self, seconds: float) -> None:
        """Sleep, and note when."""
        start = time.perf_counter()
        time.sleep(seconds)
        self.passes.append((start, time.perf_counter()))


class _Sleep(torch.autograd.Function):
    """The identity, which takes a time in each direction."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: tuple[float, float], diary: _Diary) -> Tensor:
        ctx.backward_seconds, ctx.diary = seconds[1], diary
        diary.sleep(seconds[0])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.diary.sleep(ctx.backward_seconds)
        return gradients[0], None, None


class SleepingStage(nn.Module):
    """A (virtual) stage that sleeps as long as a case says."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self, config: Any, durations: Sequence[tuple[float, float]], vp_stage: int | None, diary: _Diary
    ) -> None:
        super().__init__()
        self.config = config
        self.durations = durations
        self.vp_stage = vp_stage
        self.diary = diary
        self.received: Tensor | None = None

    def set_input_tensor(self, received: Any) -> None:
        """Take what the previous stage sent."""
        self.received = received[0] if isinstance(received, list) else received

    def forward(self, micro_batch: int) -> Tensor:
        """Sleep for a micro-batch; the output is as small as the schedule allows."""
        value = torch.zeros(1, 1, 8, requires_grad=True) if self.received is None else self.received
        output: Tensor = _Sleep.apply(value, self.durations[micro_batch], self.diary)
        return output


def run_step(case: Case, config: RunConfig, topology: Topology) -> SleptStep:
    """Run a step. Ranks are processes of one machine, so they read the same clock."""
    rank, diary = topology.pp_rank, _Diary()
    core = core_configs(config, Target("cpu", transformer_engine=False)).schedule
    virtual = case.pipeline.virtual
    stages = [
        SleepingStage(
            core,
            list(zip(case.forward[number], case.backward[number], strict=True)),
            vp_stage=chunk if virtual > 1 else None,
            diary=diary,
        )
        for chunk, number in enumerate(range(rank, case.pipeline.num_stages, case.size))
    ]
    dist.barrier()
    start = time.perf_counter()
    time.sleep(case.before[rank])
    _run_schedule(stages, case.pipeline.micro_batches, topology)
    time.sleep(case.after[rank])
    dist.barrier()
    makespan = time.perf_counter() - start
    everywhere: list[Any] = [None] * case.size
    dist.all_gather_object(everywhere, (start, diary.passes))
    common = max(start for start, _ in everywhere)
    passes = [[(begin - common, end - common) for begin, end in own] for _, own in everywhere]
    return SleptStep(makespan, passes)


def _run_schedule(stages: list[SleepingStage], micro_batches: int, topology: Topology) -> None:
    def step(numbers: Any, chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return chunk(next(numbers)), lambda output: (output.sum(), torch.ones((), dtype=torch.int), {})

    iterators = [iter(range(micro_batches)) for _ in stages]
    single = len(stages) == 1
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators[0] if single else iterators,
        model=stages[0] if single else stages,
        num_microbatches=micro_batches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
        p2p_communicator=P2P(topology.pp_group, stages[0].config),
        pg_collection=topology.groups,
    )


def main() -> None:
    """Run every case in turn; rank 0 writes the steps."""
    job = json.loads(Path(sys.argv[1]).read_text())
    cases = [Case(**fields) for fields in job["cases"]]
    virtual = cases[0].pipeline.virtual
    parallel = ParallelConfig(
        pipeline_model_parallel_size=cases[0].size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    config = RunConfig(parallel=parallel)
    found: dict[str, list[Any]] = {case.name: [] for case in cases}
    with Topology(config.parallel) as topology:
        for turn in range(1 + job["turns"]):
            for case in cases:
                step = run_step(case, config, topology)
                if turn:  # the first is a warm-up
                    found[case.name].append(asdict(step))
        if topology.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
