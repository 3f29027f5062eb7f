"""Layouts of two ranks at which plans are compared with real steps, and the rows of these steps.

All steps are in fp32 and have the same rows; images fill half of a row. Nothing of data parallelism is hidden behind
computation, since a CPU has no other engine for messages.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step import Workload

from megatron_vl.config.batch import data_parallel_size, num_microbatches
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.rows import Row

WORLD = 2
ROWS = 4
"""Rows of a step, over all ranks; a micro-batch has one."""
_ROW_OF = {"small": Workload(1, 512, 1, None), "tiny": Workload(1, 256, 8, None)}
"""By preset."""


@dataclass(frozen=True)
class Case:
    """A layout, and a run that has it."""

    name: str
    config: RunConfig

    @property
    def layout(self) -> Layout:
        """What is known of each rank."""
        return Layout.of(self.config, resolve_layout(self.config))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a data-parallel rank."""
        return num_microbatches(self.config.training, data_parallel_size(self.config.parallel, WORLD))

    @property
    def workload(self) -> Workload:
        """A micro-batch."""
        return _ROW_OF[self.config.model.preset]

    @property
    def row(self) -> Row:
        """What a row holds. ``make_batch`` of ``step.py`` makes every other position of the text a label."""
        length, images = self.workload.seq_length, self.workload.images_per_row
        text = length - images * self.config.model.resampler.num_queries
        return Row(images, 1, length, float(length**2), (text + 1) // 2, "given")


@dataclass(frozen=True)
class Job:
    """What the ranks of ``planned_step.py`` do."""

    whole: Case
    """The model in one stage."""
    mixes: tuple[tuple[int, float], ...]
    """Of each micro-batch of its step: images that are encoded, and the share of positions that are labels."""
    cases: tuple[Case, ...]
    messages: dict[str, int]
    """Bytes of the tensors that are exchanged, by the kind of exchange."""
    turns: int
    steps: int
    """Timed steps of a layout in a turn, and of the profile."""


def layouts(preset: str) -> list[Case]:
    """Return the layouts of two ranks."""
    model, pipeline = PRESETS[preset], {"pipeline_model_parallel_size": 2}
    first = f"V*{model.vision.num_layers}R|L*{model.language.num_layers}"
    options: dict[str, dict[str, Any]] = {
        "data 2": {},
        "tensor 2": {"tensor_model_parallel_size": 2},
        "tensor 2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pipeline 2": pipeline,
        "pipeline 2, tower on stage 0": pipeline | {"pipeline_layout": first},
        "pipeline 2, virtual 2": pipeline | {"virtual_pipeline_model_parallel_size": 2},
        "pipeline 2, vision on every rank": pipeline | {"vision_parallel": "data"},
    }
    return [_case(name, preset, own) for name, own in options.items()]


def recomputed(preset: str) -> list[Case]:
    """Return layouts that compute activations again."""
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    return [
        _case("pipeline 2, full recomputation", preset, {"pipeline_model_parallel_size": 2}, "full"),
        _case("tensor 2, sequence parallel, selective recomputation", preset, split, "selective"),
    ]


def whole_model(preset: str) -> Case:
    """Return the model in one stage, for a process alone."""
    return _case("one process", preset, {})


def _case(name: str, preset: str, parallel: dict[str, Any], recompute: Any = None) -> Case:
    training = TrainingConfig(micro_batch_size=1, global_batch_size=ROWS, recompute_granularity=recompute)
    config = RunConfig(
        model=PRESETS[preset],
        parallel=ParallelConfig(backend="local", **parallel),
        data=DataConfig(seq_length=_ROW_OF[preset].seq_length),
        training=training,
        optimizer=OptimizerConfig(lr_decay_style="constant"),
    )
    return Case(name, config)


def start_ranks(program: str, job: Path, result: Path) -> None:
    """Run a program of ``benchmarks/`` on :data:`WORLD` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    subprocess.run([*launcher, str(Path(__file__).with_name(program)), str(job), str(result)], check=True)
