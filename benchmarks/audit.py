"""What ``planning/`` says, beside what the program does: operations, memory and traffic, on a CPU.

    python benchmarks/audit.py [--parts operations state traffic] [--json FILE] [--smoke]

operations  A forward and a backward pass of the whole published model run on the meta device, in the recipes' three
            stages, with three images and with none. torch counts the products of each part. The plan counts what is
            required. So what is computed besides is added: the half of causal attention that a mask hides, and the
            blank image of a text-only micro-batch. The resampler's queries are projected once, not for each image.
state       Four gloo ranks build and train a narrow model at each layout. Weights, gradients, master weights and
            moments of every rank are compared. The padding of buckets is a line of its own.
traffic     In the same steps every collective and every message is intercepted. Bytes are those that a ring brings to
            a rank. What the plan leaves out is printed beside it. The rehearsal (``rehearsal/planned.py``) compares the
            same numbers with what ranks ask their process groups for. This is a second count on purpose, from real
            ranks and in another place: an error of one recorder does not hide in the other.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from measure import Row, describe_machine, write_rows

from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_vl.planning.activations import Keeping
from megatron_vl.planning.flops import FrozenParts, Work, attention_flops, training_flops
from megatron_vl.planning.gpus import GPUS
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Layout, state_bytes
from megatron_vl.planning.parameters import stage_tensors, trains
from megatron_vl.planning.stage_cost import UnitCosts
from megatron_vl.planning.traffic import DataGroup, data_traffic, stage_messages
from megatron_vl.planning.vision_share import VisionShare

Part = Literal["operations", "state", "traffic"]
WORLD = 4
GOAL = 1.001
STAGES = {
    "stage 1": (224, TrainingConfig(freeze_language_model=True)),
    "stage 2": (448, TrainingConfig()),
    "stage 3": (448, TrainingConfig(freeze_vision=True)),
}
"""Image size and frozen parts of the recipes."""
SHALLOW = replace(
    ModelConfig(),
    vision=replace(ModelConfig().vision, num_layers=4),
    language=replace(ModelConfig().language, num_layers=4),
)
NARROW = ModelConfig(
    preset="tiny",
    image_size=112,
    num_bpe_tokens=1000,
    vision=VisionConfig(num_layers=6, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, position_grid=8),
    resampler=ResamplerConfig(num_queries=16, num_attention_heads=4),
    language=LanguageConfig(num_layers=6, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=1536),
)
IMAGES = [[3, 0, 4, 1], [2, 4, 1, 1], [0, 0, 2, 6], [1, 2, 3, 2]]
"""Of each micro-batch, for each data-parallel rank: eight, which two or four ranks can share equally."""


@dataclass(frozen=True)
class Case:
    """A layout of :data:`WORLD` ranks."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    sequence: bool = False
    on_every_rank: bool = False
    """Whether every rank holds the vision part."""
    distributed: bool = True
    """Whether the optimizer is."""
    stage: str = "stage 2"

    @property
    def config(self) -> RunConfig:
        """The run: rows of 256 positions, four micro-batches of one row."""
        rows = 4 * WORLD // (self.tensor * self.pipeline)
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            sequence_parallel=self.sequence,
            use_distributed_optimizer=self.distributed,
            vision_parallel="data" if self.on_every_rank else "pipeline",
            backend="local",
        )
        training = replace(STAGES[self.stage][1], bf16=True, micro_batch_size=1, global_batch_size=rows)
        return RunConfig(model=NARROW, parallel=parallel, data=DataConfig(seq_length=256), training=training)

    @property
    def layout(self) -> Layout:
        """What is known of each rank."""
        return Layout.of(self.config, resolve_layout(self.config))

    def works(self, data_rank: int) -> list[Work]:
        """Return the work of each micro-batch; a text-only one has a blank image."""
        length, queries = self.config.data.seq_length, self.config.model.resampler.num_queries
        encoded = [max(count, 1) for count in IMAGES[data_rank]]
        return [Work(count, length, length**2, (length - count * queries + 1) // 2) for count in encoded]


CASES = [
    Case("tensor 4, sequence parallel", tensor=4, sequence=True),
    Case("tensor 4", tensor=4),
    Case("tensor 2, sequence parallel, data 2", tensor=2, sequence=True),
    Case("tensor 2, sequence parallel, pipeline 2", tensor=2, sequence=True, pipeline=2),
    Case("pipeline 4", pipeline=4),
    Case("pipeline 2, virtual 2, data 2", pipeline=2, virtual=2),
    Case("data 4"),
    Case("data 4, optimizer on every rank", distributed=False),
    Case("pipeline 4, stage 1", pipeline=4, stage="stage 1"),
    Case("tensor 2, sequence parallel, pipeline 2, stage 3", tensor=2, sequence=True, pipeline=2, stage="stage 3"),
    Case("tensor 4, sequence parallel, vision on every rank", tensor=4, sequence=True, on_every_rank=True),
    Case("pipeline 2, data 2, vision on every rank", pipeline=2, on_every_rank=True),
]


@dataclass(frozen=True)
class Line:
    """One comparison."""

    name: str
    planned: float
    counted: float
    besides: float = 0.0
    """Of what was counted, what the plan leaves out on purpose."""

    @property
    def row(self) -> Row:
        """The larger over the smaller, both with what is left out."""
        planned = self.planned + self.besides
        ratio = 1.0 if planned == self.counted else max(planned, self.counted) / max(min(planned, self.counted), 1e-9)
        return Row(self.name, planned, self.counted, ratio, GOAL, ratio <= GOAL)


def main() -> None:
    """Audit every part in turn."""
    options = _parse()
    print(describe_machine())
    rows: list[Row] = []
    parts: list[Part] = options.parts
    if "operations" in parts:
        rows += _report(operations(SHALLOW if options.smoke else ModelConfig()), "{:.6g} TFLOP", 1e12)
    if "state" in parts or "traffic" in parts:
        cases = CASES[3:4] if options.smoke else CASES
        found = run_ranks(cases)
        for case in cases:
            if "state" in parts:
                rows += _report(state(case, found[case.name]), "{:,.0f} bytes", 1)
            if "traffic" in parts:
                rows += _report(traffic(case, found[case.name]), "{:,.0f} bytes", 1)
    print(f"{sum(bool(row.met) for row in rows)} of {len(rows)} within {GOAL}")
    if options.json:
        write_rows(options.json, rows)


def _report(lines: Iterator[Line], unit: str, scale: float) -> list[Row]:
    rows = []
    for line in lines:
        row = line.row
        planned, besides, counted = (unit.format(value / scale) for value in (line.planned, line.besides, line.counted))
        verdict = "met" if row.met else "MISSED"
        print(f"{line.name}: planned {planned}, besides {besides}; counted {counted}; {row.ratio:.5f}: {verdict}")
        rows.append(row)
    return rows


def operations(model: ModelConfig) -> Iterator[Line]:
    """Count the products of the model in every stage, with images and without."""
    from audit_operations import count_operations

    for name, (image_size, training) in STAGES.items():
        config = RunConfig(model=replace(model, image_size=image_size), training=training)
        for images in (3, 0):
            work = Work(images, 2048, 2048**2, 700)
            counted = count_operations(config, work)
            for part, required in required_by_part(config, work).items():
                besides = computed_besides(config, work)[part]
                yield Line(f"operations, {name}, {images} images, {part}", required, counted[part], besides)


def required_by_part(config: RunConfig, work: Work) -> dict[str, float]:
    """Return the operations that the plan requires of each part."""
    model = config.model
    flops = training_flops(model, FrozenParts.of(config.training), work)
    return {
        "vision": flops.patch_embed + model.vision.num_layers * flops.vision_layer,
        "resampler": flops.resampler,
        "language layers": model.language.num_layers * flops.language_layer,
        "head": flops.head,
    }


def computed_besides(config: RunConfig, work: Work) -> dict[str, float]:
    """Return what a CPU computes beyond what is required, in each part."""
    model, frozen = config.model, FrozenParts.of(config.training)
    masked_half = model.language.num_layers * attention_flops(model, frozen, work).language_layer
    blank = required_by_part(config, Work(0 if work.num_images else 1))
    once = (1 if frozen.resampler else 3) * 2 * model.resampler.num_queries * model.language.hidden_size**2
    saved = (max(work.num_images, 1) - 1) * once
    return {
        "vision": blank["vision"],
        "resampler": blank["resampler"] - saved,
        "language layers": masked_half,
        "head": 0.0,
    }


def run_ranks(cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Train a step at each layout on :data:`WORLD` ranks; return what each rank found."""
    with tempfile.TemporaryDirectory() as directory:
        job, result = Path(directory) / "job", Path(directory) / "result.json"
        job.write_bytes(pickle.dumps({case.name: (case.config, IMAGES) for case in cases}))
        rank = Path(__file__).with_name("audit_rank.py")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        launcher += ["--log-dir", directory]
        subprocess.run([*launcher, str(rank), str(job), str(result)], check=True)
        found: dict[str, list[dict[str, Any]]] = json.loads(result.read_text())
        return found


def state(case: Case, found: list[dict[str, Any]]) -> Iterator[Line]:
    """Compare what ranks hold. Ranks of a data-parallel group divide masters and moments, so their sum is compared."""
    config, layout = case.config, case.layout
    size = data_parallel_size(config.parallel, WORLD)
    plans = [state_bytes(config, rank, size, everywhere=layout.everywhere) for rank in layout.ranks]
    for name in ("weights", "gradients"):
        pairs = [(plans[rank["pipeline_rank"]][name], rank[name]) for rank in found]
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        yield Line(f"{name} of each rank, {case.name}", *worst)
    for name in ("masters", "moments"):
        planned = sum(plans[rank["pipeline_rank"]][name] for rank in found)
        yield Line(f"{name} of all ranks, {case.name}", planned, sum(rank[name] for rank in found))


def traffic(case: Case, found: list[dict[str, Any]]) -> Iterator[Line]:
    """Compare what is exchanged in a step, summed over all ranks."""
    yield Line(
        f"tensor parallelism, {case.name}",
        sum(_tensor(case, rank) for rank in found),
        _received(found, "layers tensor"),
        sum(_replicas(case, rank) for rank in found),
    )
    yield Line(f"messages, {case.name}", _messages(case), sum(rank["sent"] for rank in found))
    groups = ("tensor", "data", "pipeline", "model", "world", "other")
    buckets = sum(_received(found, f"buckets {group}") for group in groups)
    yield Line(f"data parallelism, {case.name}", *_buckets(case, found, buckets))


def _received(found: list[dict[str, Any]], kind: str) -> float:
    return sum(rank["received"].get(kind, 0.0) for rank in found)


def _tensor(case: Case, rank: dict[str, Any]) -> float:
    """Return the planned bytes of tensor parallelism on a rank."""
    keeping = Keeping.of(case.config)
    chunks = case.layout.stages.stages_of_rank(rank["pipeline_rank"])
    units = [UnitCosts.of(case.config, work, keeping) for work in case.works(rank["data_rank"])]
    return sum(unit.stage(chunk, trained=0).gathered for unit in units for chunk in chunks)


def _replicas(case: Case, rank: dict[str, Any]) -> float:
    """Return the bytes of gradients that sequence parallelism adds up once a step: norms, and biases after a sum."""
    config = case.config
    if not config.parallel.sequence_parallel:
        return 0.0
    frozen, size = FrozenParts.of(config.training), config.parallel.tensor_model_parallel_size
    chunks = case.layout.stages.stages_of_rank(rank["pipeline_rank"])
    specs = [spec for chunk in chunks for spec in stage_tensors(config.model, chunk)]
    copied = sum(
        spec.size for spec in specs if ".layers." in spec.name and spec.split_axis is None and trains(spec.name, frozen)
    )
    return 2 * 4 * copied * (size - 1) / size


def _messages(case: Case) -> float:
    """Return the planned bytes of all messages: between stages, of features, and of the gradients of features."""
    config, stages = case.config, case.layout.stages
    tensor = config.parallel.tensor_model_parallel_size
    works = [work for rank in range(data_parallel_size(config.parallel, WORLD)) for work in case.works(rank)]
    ranks = range(stages.pipeline_size)
    sent = (stage_messages(config, stages, rank, work) for rank in ranks for work in works)
    total = tensor * sum(size for one in sent for size in one.values())
    for images in IMAGES[: data_parallel_size(config.parallel, WORLD)]:
        share = VisionShare.of(config, Work(sum(images)), 1, case.layout.everywhere)
        total += tensor * sum(share.exchanged_bytes) if share else 0.0
    return total


def _buckets(case: Case, found: list[dict[str, Any]], counted: float) -> tuple[float, float, float]:
    """Return the bytes of gradients and weights as planned and as counted, and those of padding."""
    config, layout, gpu = case.config, case.layout, GPUS["h100"]
    size = data_parallel_size(config.parallel, WORLD)
    planned = padding = 0.0
    for rank in found:
        plan = layout.ranks[rank["pipeline_rank"]]
        own = data_traffic(config, plan.trained - layout.everywhere, gpu, DataGroup((size,)))
        every = data_traffic(config, layout.everywhere, gpu, DataGroup((WORLD,)))
        planned += own.nvlink + every.nvlink
        extra = rank["buckets"] - rank["gradients"]
        passes = 1.5 if config.parallel.use_distributed_optimizer else 2  # gradients and bf16 weights
        padding += passes * extra * (size - 1) / size
    return planned, counted, padding


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("operations", "state", "traffic")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to compare")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="four layers of each kind, one layout: shows that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
