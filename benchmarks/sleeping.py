"""Steps of a pipeline whose stages sleep instead of computing, on Megatron-Core's own schedules.

Ranks run the schedule of a training step over gloo (``sleeping_rank.py``). So the makespan of eight ranks can be
measured on two cores: the order of the passes, the messages and the waiting are real, and no rank takes the processor
from another. It is no measurement of a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.schema import ModelConfig
from megatron_vl.planning.flops import FrozenParts, Work, unit_flops
from megatron_vl.planning.layout import PipelineLayout, StageLayout
from megatron_vl.planning.schedule import Pipeline
from megatron_vl.planning.simulation import StageTimes, Timeline, simulate

_FORWARD = FrozenParts(vision=True, resampler=True, language_model=True)


@dataclass(frozen=True)
class Case:
    """How long the ranks of one step sleep, in operations until :meth:`scaled`."""

    name: str
    forward: list[list[float]]
    """Of each (virtual) stage, for each micro-batch."""
    backward: list[list[float]]
    before: list[float]
    """Of each rank, before the schedule."""
    after: list[float]

    @property
    def size(self) -> int:
        """Number of pipeline ranks."""
        return len(self.before)

    @property
    def pipeline(self) -> Pipeline:
        """The sizes of the schedule."""
        return Pipeline(self.size, len(self.forward) // self.size, len(self.forward[0]))

    def scaled(self, factor: float) -> Case:
        """Return the case with every duration multiplied."""

        def times(values: list[float]) -> list[float]:
            return [factor * value for value in values]

        return Case(
            self.name,
            [times(stage) for stage in self.forward],
            [times(stage) for stage in self.backward],
            times(self.before),
            times(self.after),
        )

    def timeline(self) -> Timeline:
        """Return when each pass runs by ``planning/simulation.py``, if messages take no time."""
        times = [
            [StageTimes(forward, backward) for forward, backward in zip(*stage, strict=True)]
            for stage in zip(self.forward, self.backward, strict=True)
        ]
        return simulate(self.pipeline, times, self.before)

    def simulated(self) -> float:
        """Return the makespan of :meth:`timeline`."""
        timeline = self.timeline()
        return max(timeline.end_of(rank) + self.after[rank] for rank in range(self.size))


@dataclass(frozen=True)
class SleptStep:
    """A measured step of a case, in seconds after its common start."""

    makespan: float
    passes: list[list[tuple[float, float]]]
    """When each rank began and ended each of its passes, in the order of the rank."""


def case_of(name: str, layout: PipelineLayout, rows: Sequence[Work], model: ModelConfig) -> Case:
    """Return the operations of a layout whose micro-batches have the work of ``rows``."""
    passes = [[operations(stage, row, model) for row in rows] for stage in layout.stages]
    idle = [0.0] * layout.pipeline_size
    forward = [[forward for forward, _ in stage] for stage in passes]
    return Case(name, forward, [[backward for _, backward in stage] for stage in passes], idle, idle)


def operations(stage: StageLayout, row: Work, model: ModelConfig) -> tuple[float, float]:
    """Return the operations of a stage, forward and backward, if everything trains."""
    forward, both = (unit_flops(model, frozen, row) for frozen in (_FORWARD, FrozenParts()))
    resampler = model.vision.num_layers
    units = [*stage.vision_layers, *[resampler] * stage.resampler]
    units += [resampler + 1 + layer for layer in stage.language_layers]
    units += [len(both) - 1] * stage.head
    own = sum(forward[unit] for unit in units)
    return own, sum(both[unit] for unit in units) - own


def measure(cases: Sequence[Case], *, turns: int) -> dict[str, list[SleptStep]]:
    """Return the steps of each case, one for each turn; the cases take turns, on the same ranks."""
    with tempfile.TemporaryDirectory() as directory:
        job, result = Path(directory) / "job.json", Path(directory) / "result.json"
        job.write_text(json.dumps({"turns": turns, "cases": [asdict(case) for case in cases]}))
        rank = Path(__file__).with_name("sleeping_rank.py")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", directory]
        launcher += ["--nproc-per-node", str(cases[0].size), str(rank), str(job), str(result)]
        subprocess.run(launcher, check=True, stderr=subprocess.DEVNULL)
        found: dict[str, list[dict[str, Any]]] = json.loads(result.read_text())
        return {name: [SleptStep(**step) for step in steps] for name, steps in found.items()}
