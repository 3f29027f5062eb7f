"""The time of our training step against a plain PyTorch model of the same sizes.

    python benchmarks/step.py [--sizes small tiny] [--threads 1 2] [--turns 7] [--json FILE] [--profile]

Ours is what ``tools/train.py`` runs: the model of ``build_parallel_model`` and ``train_step``, on the local backend in
a world of one, with Megatron-Core's data parallelism, optimizer and schedule around it. The reference is
``plain_model.py``. Both get the same weights and the same batch, in fp32, and do the same work: loss summed over the
supervised tokens and divided by their number, backward, gradients clipped to norm 1, AdamW. Before anything is timed,
one step of each must give the same loss, gradient norm, gradients and weights.

Two references are timed, to say which gain comes from where: one computes logits at every position, as plain models do,
and one only where there is a label, as ours does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import Row, Times, compare, describe_machine, ratios, take_turns, write_rows
from plain_model import PlainQwenVL, plain_tensors
from torch import Tensor

from megatron_vl.backends.platform import prepare_process
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_vl.data.loading.batch import MicroBatch

GOAL = 1.0
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workload:
    """The rows of one step."""

    rows: int
    seq_length: int
    images_per_row: int
    goal: float | None

    @property
    def line(self) -> int:
        """Positions of the step."""
        return self.rows * self.seq_length


# Two 448-px images take half of the 1,024 positions; the tiny rows are about those of the quickstart.
WORKLOADS = {
    "small": Workload(rows=1, seq_length=1024, images_per_row=2, goal=GOAL),
    "tiny": Workload(rows=4, seq_length=512, images_per_row=9, goal=None),
}


def main() -> None:
    """Measure every size at every number of threads, and print one line for each comparison."""
    options = _parse()
    prepare_process()
    print(describe_machine())
    rows = [
        row for size in options.sizes for threads in options.threads for row in _measure(size, threads, options=options)
    ]
    if options.json:
        write_rows(options.json, rows)


def make_batch(model: ModelConfig, workload: Workload) -> MicroBatch:
    """Random rows: the images evenly spread, a label at every other position that is not a slot."""
    generator = torch.Generator().manual_seed(0)
    queries, total = model.resampler.num_queries, workload.line
    images = workload.rows * workload.images_per_row
    slots = (torch.arange(images) * (total // images))[:, None] + torch.arange(queries)
    is_text = torch.ones(total, dtype=torch.bool).index_fill(0, slots.flatten(), False)
    supervised = torch.nonzero(is_text).flatten()[::2]
    size = (images, 3, model.image_size, model.image_size)
    return MicroBatch(
        tokens=torch.randint(0, model.num_bpe_tokens, (total,), generator=generator),
        positions=torch.arange(workload.seq_length).repeat(workload.rows),
        cu_seqlens=torch.arange(0, total + 1, workload.seq_length, dtype=torch.int32),
        span_lengths=(workload.seq_length,) * workload.rows,
        supervised=supervised,
        targets=torch.randint(0, model.num_bpe_tokens, (len(supervised),), generator=generator),
        slots=slots.flatten(),
        pixels=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        span_images=torch.arange(images),
        num_images=images,
        num_samples=images,
        num_tokens=total,
        squared_spans=workload.rows * workload.seq_length**2,
    )


@dataclass
class StepOutcome:
    """What one step computed, under the plain model's names."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class OurSteps:
    """Our model, stepping on one batch."""

    def __init__(self, config: RunConfig, topology: object, batch: MicroBatch) -> None:
        from megatron_vl.training.parallel_model import build_parallel_model

        self.config, self.topology, self.batch = config, topology, batch
        self.model = build_parallel_model(config, topology)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights, buffers included."""
        state = dict(self.model.chunks[0].named_parameters()) | dict(self.model.chunks[0].named_buffers())
        return plain_tensors({name: value.detach().clone() for name, value in state.items()}, self.config.model)

    def step(self) -> StepOutcome:
        """One step, and everything that it computed."""
        result = self()
        gradients = {name: value.main_grad.clone() for name, value in self.model.chunks[0].named_parameters()}
        plain = plain_tensors(gradients, self.config.model)
        return StepOutcome(result.loss.mean, result.grad_norm, plain, self.weights())

    def __call__(self):
        """One step."""
        from megatron_vl.training.step import train_step

        return train_step(self.model, [self.batch], config=self.config, topology=self.topology, step=0)


class PlainSteps:
    """The plain model, stepping on one batch."""

    def __init__(self, config: RunConfig, batch: MicroBatch, weights: dict[str, Tensor], *, labelled_slot_head: bool):
        self.batch, self.clip = batch, config.optimizer.clip_grad
        self.model = PlainQwenVL(config.model, seq_length=config.data.seq_length, labelled_slot_head=labelled_slot_head)
        self.model.load_state_dict(weights)
        parameters, settings = list(self.model.parameters()), config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=True,
        )

    def step(self) -> StepOutcome:
        """One step, and everything that it computed."""
        loss, grad_norm = self()
        gradients = {name: value.grad.clone() for name, value in self.model.named_parameters()}
        return StepOutcome(float(loss), float(grad_norm), gradients, dict(self.model.state_dict()))

    def __call__(self) -> tuple[Tensor, Tensor]:
        """One step; returns the loss of a token and the norm of the gradient."""
        self.optimizer.zero_grad()
        loss = self.model(self.batch) / self.batch.targets.numel()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach(), grad_norm


def check_same(ours: StepOutcome, plain: StepOutcome) -> None:
    """Both steps computed the same; otherwise their times would say nothing.

    Raises:
        SystemExit: they did not.
    """
    found = {
        "loss": abs(ours.loss / plain.loss - 1.0),
        "gradient norm": abs(ours.grad_norm / plain.grad_norm - 1.0),
        "gradients": _largest_difference(ours.gradients, plain.gradients),
        "weights": _largest_difference(ours.weights, plain.weights),
    }
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if wrong:
        raise SystemExit(f"ours and the plain model do not compute the same step: relative differences {wrong}")


def _largest_difference(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The largest norm of a difference, relative to the largest norm of a tensor of that kind."""
    assert ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
    largest = max(float(value.norm()) for value in plain.values())
    return max(float((ours[name] - plain[name]).norm()) for name in plain) / largest


def _measure(size: str, threads: int, *, options: argparse.Namespace) -> list[Row]:
    from megatron_vl.parallel.topology import Topology

    torch.set_num_threads(threads)
    model, workload = PRESETS[size], WORKLOADS[size]
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(backend="local"),
        data=DataConfig(seq_length=workload.seq_length),
        training=TrainingConfig(micro_batch_size=workload.rows, global_batch_size=workload.rows),
        optimizer=OptimizerConfig(lr_decay_style="constant"),
    )
    batch = make_batch(model, workload)
    with Topology(config.parallel) as topology:
        ours = OurSteps(config, topology, batch)
        weights = ours.weights()
        plain = PlainSteps(config, batch, weights, labelled_slot_head=False)
        labelled = PlainSteps(config, batch, weights, labelled_slot_head=True)
        outcome = ours.step()
        check_same(outcome, plain.step())
        check_same(outcome, labelled.step())
        contenders: dict[str, Callable[[], object]] = {"ours": ours, "plain": plain, "labelled": labelled}
        times = take_turns(contenders, turns=options.turns)
        if options.profile:
            _profile(contenders)
    title = f"{size}, {threads} thread" + ("s" if threads > 1 else "")
    return [
        _report(title, times["ours"], times["plain"], workload),
        _report(
            f"{title}, reference with labelled-slot head",
            times["ours"],
            times["labelled"],
            replace(workload, goal=None),
        ),
    ]


def _report(name: str, ours: Times, reference: Times, workload: Workload) -> Row:
    row = compare(name, ours, reference, goal=workload.goal)
    wall, cpu = ratios(ours.wall, reference.wall), ratios(ours.cpu, reference.cpu)
    verdict = "" if row.met is None else f"; goal <= {row.goal:.2f}: {'met' if row.met else 'MISSED'}"
    print(
        f"{name}: ours {row.ours:.3f} s, reference {row.reference:.3f} s a step "
        f"({1e6 * row.ours / workload.line:.0f} and {1e6 * row.reference / workload.line:.0f} us a slot); "
        f"ratio {wall.middle:.3f} [{wall.low:.3f} .. {wall.high:.3f}], "
        f"of CPU time {cpu.middle:.3f} [{cpu.low:.3f} .. {cpu.high:.3f}]{verdict}",
        flush=True,
    )
    return row


def _profile(contenders: dict[str, Callable[[], object]]) -> None:
    """Where the time goes, by operator."""
    for name, run in contenders.items():
        with torch.profiler.profile() as profile:
            run()
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
        print(f"--- {name}\n{table}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=7, help="measured steps of each contender")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
