"""The four recipes of the tiny model after one another, each from the checkpoint of the one before, and an answer.

It is the quickstart without its data: the same few random rows at every step, which a model that trains learns by
heart. So a loss that does not fall says that something between forward and update is wrong on this device.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu_parts.device import current_device, seconds_of
from gpu_parts.report import Report
from gpu_parts.rows import SHAPES, make_batches
from megatron_vl.backends.platform import prepare_process
from megatron_vl.checkpoint import contents
from megatron_vl.config.load import load_config
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.requests import GenerationOptions, Request
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "tiny"
ROWS = 4


@dataclass(frozen=True)
class TinyStage:
    """A recipe, and the rows that it reads here."""

    recipe: str
    shape: str
    falls_to: float
    """Largest share of the first loss that the last one may be. A frozen language model learns its rows slowly."""


STAGES = (
    TinyStage("stage0_text.yaml", "text", 0.9),
    TinyStage("stage1_pretrain.yaml", "stage1", 0.99),
    TinyStage("stage2_multitask.yaml", "stage2", 0.9),
    TinyStage("stage3_sft.yaml", "stage3", 0.9),
)


def measure_tiny(report: Report, *, small: bool) -> None:
    """Train all stages and answer once."""
    steps = 6 if small else 40
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        before: Path | None = None
        for number, stage in enumerate(STAGES):
            config = load_config(RECIPES / stage.recipe, ["--train-iters", str(steps), "--lr-warmup-iters", "2"])
            if small:
                config = replace(config, data=replace(config.data, seq_length=160))
            losses, before = _train(config, stage, before, Path(folder, str(number)))
            allowed = 1.0 if small else stage.falls_to
            report.cost(f"tiny, {stage.recipe}: loss after {steps} steps", losses[-1], losses[0], goal=allowed)
        assert before is not None
        _answer(before, report)


def _train(config: RunConfig, stage: TinyStage, before: Path | None, save: Path) -> tuple[list[float], Path]:
    batches = make_batches(config, SHAPES[stage.shape], count=ROWS)
    with Topology(config.parallel) as topology:
        model = build_parallel_model(config, topology, fresh_weights=before is None)
        if before is not None:
            contents.load(contents.Trained(model.chunks, None), before, config=config, topology=topology)
            model.optimizer.reload_model_params()
        losses = [
            train_step(model, batches, config=config, topology=topology, step=step).loss.mean
            for step in range(config.training.train_iters)
        ]
        trained = contents.Trained(model.chunks, model.optimizer)
        path = contents.save(trained, {"step": len(losses)}, config=config, topology=topology, root=save)
    return losses, path


def _answer(checkpoint: Path, report: Report) -> None:
    with Topology(ParallelConfig(backend="local")) as topology:
        engine = Engine.from_checkpoint(checkpoint, parallel=ParallelConfig(backend="local"), topology=topology)
        prompt, options = _prompt(engine), GenerationOptions(max_new_tokens=8)
        answers: list[list[list[int]]] = []
        times = seconds_of(lambda: answers.append(_ask(engine, prompt, options)), repeat=1, warm_up=1)
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    report.cost("tiny: answers that differ when asked twice", differ, 0.0)
    report.figure(f"tiny: ms an answer of 8 tokens on {current_device().type}", 1e3 * times[0])


def _ask(engine: Engine, prompt: Request, options: GenerationOptions) -> list[list[int]]:
    return [list(answer.tokens) for answer in engine.generate([prompt], options)]


def _prompt(engine: Engine) -> Request:
    special, model = SpecialTokens(engine.model.num_bpe_tokens), engine.model
    image = [special.img_start, *[special.img_pad] * model.resampler.num_queries, special.img_end]
    pixels = torch.randint(0, 256, (1, 3, model.image_size, model.image_size), dtype=torch.uint8)
    return Request((*image, 5, 6, 7), pixels)
