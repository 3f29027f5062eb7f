"""What a frozen part saves, in time and in products.

    python benchmarks/frozen.py [--turns 9] [--threads 1] [--json FILE] [--smoke]

A forward and a backward pass of recipe stages 1 and 3 is timed beside one of stage 2, on the same rows and images, with
a model of width 1,024. The ratio of times is compared with the ratio of operations. It is larger where what is not a
product (norms, activations, the loss) weighs more than in stage 2.

On the meta device torch counts the products. A frozen language model computes no gradient of a weight, and a frozen
tower has no backward pass at all: both counts are exactly zero.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from audit import STAGES, computed_besides, required_by_part
from audit_operations import count_operations
from measure import Row, describe_machine, ratios, take_turns, write_rows
from step import Workload, make_batch
from torch import nn

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
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.model.build import build_model
from megatron_vl.parallel.topology import Topology

GOAL = 1.1
MODEL = ModelConfig(
    preset="wide",
    image_size=224,
    num_bpe_tokens=4000,
    vision=VisionConfig(num_layers=3, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16),
    resampler=ResamplerConfig(num_queries=64, num_attention_heads=8),
    language=LanguageConfig(
        num_layers=3, hidden_size=1024, ffn_hidden_size=2752, num_attention_heads=8, vocab_size=4608
    ),
)
SMALL = replace(
    MODEL,
    vision=replace(MODEL.vision, hidden_size=128, ffn_hidden_size=512),
    language=replace(MODEL.language, hidden_size=128, ffn_hidden_size=344, vocab_size=1024),
    num_bpe_tokens=500,
)
LENGTH = 512
IMAGES = 2


def main() -> None:
    """Time and count stages 1 and 3 beside stage 2."""
    options = _parse()
    torch.set_num_threads(options.threads)
    print(describe_machine())
    model = SMALL if options.smoke else MODEL
    configs = {name: _config(model, training) for name, (_, training) in STAGES.items()}
    batch = make_batch(model, Workload(1, LENGTH, IMAGES, None))
    rows = _times(configs, batch, turns=options.turns) + _products(configs, batch)
    if options.json:
        write_rows(options.json, rows)


def _config(model: ModelConfig, training: TrainingConfig) -> RunConfig:
    training = replace(training, micro_batch_size=1, global_batch_size=1)
    parallel, data = ParallelConfig(backend="local"), DataConfig(seq_length=LENGTH)
    return RunConfig(model=model, parallel=parallel, data=data, training=training)


def _times(configs: dict[str, RunConfig], batch: MicroBatch, *, turns: int) -> list[Row]:
    with Topology(ParallelConfig()) as topology:
        models = {name: build_model(config, topology)[0] for name, config in configs.items()}
        contenders = {name: lambda model=model: _pass(model, batch) for name, model in models.items()}
        times = take_turns(contenders, turns=turns)
    operations = {name: _operations(config, batch) for name, config in configs.items()}
    rows = []
    for name in ("stage 1", "stage 3"):
        spread = ratios(times[name].wall, times["stage 2"].wall)
        expected = operations[name] / operations["stage 2"]
        ratio = spread.middle / expected
        met = ratio <= GOAL
        print(
            f"{name} / stage 2: time {spread.middle:.3f} [{spread.low:.3f} .. {spread.high:.3f}], operations "
            f"{expected:.3f}: {ratio:.3f}; goal <= {GOAL}: {'met' if met else 'MISSED'}"
        )
        rows.append(Row(f"time of {name} over stage 2", spread.middle, expected, ratio, GOAL, met))
    return rows


def _pass(model: nn.Module, batch: MicroBatch) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(batch).sum().backward()


def _operations(config: RunConfig, batch: MicroBatch) -> float:
    """Return what is computed: what is required, and what a CPU computes besides."""
    required, besides = required_by_part(config, batch.work), computed_besides(config, batch.work)
    return sum(required.values()) + sum(besides.values())


def _products(configs: dict[str, RunConfig], batch: MicroBatch) -> list[Row]:
    """Count the products that a frozen part must not compute."""
    rows = []
    for name, part, what in (
        ("stage 1", "language layers", "gradients of weights in the frozen language layers"),
        ("stage 3", "vision", "backward pass of the frozen tower"),
    ):
        config = configs[name]
        counted = count_operations(config, batch.work)[part]
        allowed = required_by_part(config, batch.work)[part] + computed_besides(config, batch.work)[part]
        met = counted == allowed
        print(f"{name}, {what}: {counted - allowed:.0f} operations; goal 0: {'met' if met else 'MISSED'}")
        rows.append(Row(f"operations of the {what}, {name}", counted - allowed, 0.0, counted / allowed, 1.0, met))
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="measured passes of each stage")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="two turns of a narrow model: shows that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.turns = 2
    return options


if __name__ == "__main__":
    main()
