"""Say what a plan is: tables and lines for people, and a record for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.memory import RankMemory
from megatron_vl.planning.parameters import count_parameters
from megatron_vl.planning.plans import Answer, Plan, Question

_GB = 1e9
_HEAD: tuple[str, ...] = (
    "plan", "tensor", "pipeline", "virtual", "vision", "data", "micro-batch", "recompute", "optimizer", "GB", "rows",
    "s/step", "tokens/s/GPU", "MFU", "days", "GPU-hours",
)  # fmt: skip
_NOTABLE = 0.02
"""Share of a step from which a loss is a reason."""


def describe_run(question: Question, plan: Plan) -> list[str]:
    """Return the model and the stage in two lines."""
    config, row = question.config, question.row
    model, training = config.model, config.training
    frozen = FrozenParts.of(training)
    names = ("vision tower", "resampler", "language model")
    flags = (frozen.vision, frozen.resampler, frozen.language_model)
    trained = ", ".join(name for name, is_frozen in zip(names, flags, strict=True) if not is_frozen)
    parameters = sum(count_parameters(model).values())
    rows = plan.candidate.config.training.global_batch_size
    samples = f" (the recipe: {training.global_batch_samples:,} samples)" if training.global_batch_samples else ""
    return [
        f"model: {model.preset}, {parameters:,} parameters; trains {trained}; images of {model.image_size} px",
        f"stage: {training.train_iters:,} steps of {rows:,} rows{samples} and {plan.time.required / 1e15:.4g} PFLOP; a "
        f"row of {config.data.seq_length:,} tokens has {row.images:.3g} images and {row.samples:.3g} samples "
        f"({row.source})",
    ]


def describe_plans(plans: Sequence[Plan]) -> list[str]:
    """Return the plans as a table."""
    rows = [_HEAD, *(_cells(number, plan) for number, plan in enumerate(plans, 1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    why = ["why", *(", ".join(reasons(plan, plans)) for plan in plans)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), reason])
        for row, reason in zip(rows, why, strict=True)
    ]


def reasons(plan: Plan, plans: Sequence[Plan]) -> list[str]:
    """Return in what a plan is the best of those shown, and what it loses."""
    found = []
    if plan is plans[0]:
        found.append("fastest")
    if plan is min(plans, key=_total):
        found.append("least memory")
    if max(map(_exposed, plans)) > _NOTABLE and plan is min(plans, key=_exposed):
        found.append("least exposed communication")
    if not plan.candidate.family.recomputes_all and any(one.candidate.family.recomputes_all for one in plans):
        layer = "language layer" if _vision_again(plan.candidate.config) else "layer"
        found.append(f"no {layer} is computed twice")
    if plan is not plans[0]:
        percent = round(100 * (plan.seconds_per_row / plans[0].seconds_per_row - 1))
        found.append(f"{percent}% slower than plan 1" if percent > 0 else "as fast as plan 1")
    time = plan.time
    losses = (
        ("bubble", time.bubble),
        ("exposed tensor-parallel communication", time.exposed_tensor),
        ("exposed data-parallel communication", time.exposed_data),
        ("waiting for the CPU's launches", time.launches + time.vision_launches),
        ("optimizer", time.optimizer),
    )
    found += [f"{name} {share / time.seconds:.0%}" for name, share in losses if share > _NOTABLE * time.seconds]
    return found


def _vision_again(config: RunConfig) -> bool:
    """Return whether every rank computes layers of the tower twice."""
    parallel = config.parallel
    return parallel.vision_parallel == "data" and parallel.vision_recompute and not config.training.freeze_vision


def describe_best(question: Question, plan: Plan, number: int) -> list[str]:
    """Return memory, time and traffic of one plan, part by part."""
    one, time, sent = plan.candidate, plan.time, plan.time.traffic
    full = one.fullest
    waiting = f" (in it waiting for the CPU {time.vision_launches:.2g})" if time.vision_launches else ""
    parts = ", ".join(f"{name} {_decimal(value / _GB, 1)}" for name, value in asdict(full).items())
    limit = f"{question.gpu.memory / _GB:.0f} GB x {question.usable:g} = {question.limit / _GB:.1f} GB"
    return [
        f"plan {number}: {one.micro_batches} micro-batches on each of {one.data_parallel} data-parallel ranks",
        f"  pipeline layout: {one.layout.stages}{_settings(one.config)}",
        f"  memory of the fullest rank ({one.memory.index(full)}): {_decimal(full.total / _GB, 1)} GB of {limit}: "
        f"{parts}",
        f"  host memory that a save gathers: up to {_decimal(one.host_bytes / _GB, 1)} GB on a rank",
        f"  step: {time.seconds:.3g} s = computation {time.busiest:.3g} (in it tensor-parallel collectives "
        f"{time.exposed_tensor:.2g}, waiting for the CPU {time.launches:.2g}) + bubble {time.bubble:.2g} + vision part "
        f"on every rank {time.vision:.2g}{waiting} + exposed data-parallel {time.exposed_data:.2g} + optimizer "
        f"{time.optimizer:.2g}",
        f"  a GPU sends in a step, over NVLink: tensor {sent.tensor / _GB:.3g} GB, pipeline "
        f"{sent.pipeline_nvlink / _GB:.3g} GB, data {sent.data_nvlink / _GB:.3g} GB; over the network: pipeline "
        f"{sent.pipeline_network / _GB:.3g} GB, data {sent.data_network / _GB:.3g} GB",
    ]


def _settings(config: RunConfig) -> str:
    """Return what a plan chooses beside the columns of the table."""
    parallel, training = config.parallel, config.training
    chosen = []
    if parallel.tensor_model_parallel_size > 1:
        chosen.append("with sequence parallelism" if parallel.sequence_parallel else "without sequence parallelism")
    if parallel.vision_parallel == "data":
        again, size = "and kept for the backward pass", parallel.vision_micro_batch_size
        if parallel.vision_recompute:
            layers = parallel.vision_recompute_granularity == "layers"
            again = "and layer by layer again" if layers else "and again for the backward pass"
        chosen.append(f"images encoded {size} at a time" + ("" if training.freeze_vision else f" {again}"))
    return "".join(f"; {text}" for text in chosen)


def describe_assumptions(question: Question, *, measured: Sequence[str]) -> list[str]:
    """Return which numbers were not measured on the machine that the plan is for.

    Args:
        measured: names of the rates that the user has given.
    """
    gpu = question.gpu.within(question.num_gpus)
    rates = (
        f"matrix products {gpu.products / 1e12:.0f} TFLOP/s, attention {gpu.attention / 1e12:.0f} TFLOP/s, memory "
        f"{gpu.memory_rate / _GB:.0f} GB/s, NVLink {gpu.nvlink.bandwidth / _GB:.0f} GB/s, network "
        f"{gpu.network.bandwidth / _GB:.1f} GB/s, {1e3 * gpu.host_seconds:.1f} ms of the CPU to launch a layer"
    )
    said = f"measured: {', '.join(measured)}" if measured else "published maxima; nothing was calibrated (--measured)"
    lines = [
        f"rates: {rates}. {said[0].upper()}{said[1:]}",
        "a step is at least as long as calculated: kernels of a step are slower than the best of their kind, and "
        "nothing here waits for data, other jobs or slow GPUs. The H200 of docs/results/gpu.md took up to 1.3 times as "
        "long",
        f"all ranks have the same work; NVLink connects {gpu.nvlink_domain} GPUs, and {gpu.per_node} share a host; "
        "ranks fill hosts in their order",
    ]
    if question.config.training.fp8_format is not None:
        lines.append(
            "training.fp8_format: memory counts the FP8 copies of weights, and all else as in bf16; times are those of "
            "bf16, although a step may then be shorter, since no rate of FP8 was measured at these sizes"
        )
    assumed = gpu.assumed if not measured else [text for text in gpu.assumed if "reach" not in text]
    return lines + [f"not published: {text}" for text in assumed]


def record(question: Question, answer: Answer) -> dict[str, Any]:
    """Return everything that is known of the plans, for JSON."""
    return {
        "gpu": asdict(question.gpu.within(question.num_gpus)),
        "gpus": question.num_gpus,
        "row": asdict(question.row),
        "usable_bytes": question.limit,
        "plans": [_record_of(plan, answer.plans) for plan in answer.plans],
        "rejected": list(answer.rejected),
        "valid": answer.num_valid,
        "fitting": answer.num_fitting,
    }


def memory_line(rank: int, memory: RankMemory) -> str:
    """Return the memory of a pipeline rank, part by part."""
    parts = ", ".join(f"{name} {value / _GB:.2f}" for name, value in asdict(memory).items())
    return f"pipeline rank {rank}: {memory.total / _GB:.1f} GB = {parts}"


def _record_of(plan: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    one, time = plan.candidate, plan.time
    config = one.config
    times = (
        "seconds",
        "busiest",
        "bubble",
        "vision",
        "vision_launches",
        "exposed_tensor",
        "exposed_data",
        "optimizer",
        "launches",
        "required",
    )
    return {
        "parallel": asdict(config.parallel),
        "micro_batch_size": config.training.micro_batch_size,
        "recompute_granularity": config.training.recompute_granularity,
        "global_batch_rows": config.training.global_batch_size,
        "micro_batches": one.micro_batches,
        "data_parallel": one.data_parallel,
        "pipeline_layout": str(one.layout.stages),
        "memory_bytes": [asdict(memory) | {"total": memory.total} for memory in one.memory],
        "save_host_bytes": one.host_bytes,
        "step": {name: getattr(time, name) for name in times} | {"tokens": time.tokens},
        "sent_bytes": asdict(time.traffic),
        "tokens_per_second_per_gpu": plan.tokens_per_gpu,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "why": reasons(plan, plans),
    }


def _cells(number: int, plan: Plan) -> tuple[str, ...]:
    one = plan.candidate
    parallel, training = one.config.parallel, one.config.training
    return (
        str(number),
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size or "-"),
        "stages" if parallel.vision_parallel == "pipeline" else "everywhere",
        str(one.data_parallel),
        str(training.micro_batch_size),
        training.recompute_granularity or "none",
        "sharded" if parallel.use_distributed_optimizer else "whole",
        _decimal(one.fullest.total / _GB, 1),
        f"{training.global_batch_size:,}",
        _decimal(plan.time.seconds, 2),
        _decimal(plan.tokens_per_gpu, 0),
        _decimal(plan.mfu, 3),
        _decimal(plan.hours / 24, 2),
        _decimal(plan.gpu_hours, 0),
    )


def _decimal(value: float, places: int) -> str:
    """Return a number with so many decimal places, or more where they would leave fewer than two digits of it."""
    return f"{value:,.{places}f}" if value >= 10 ** (1 - places) or not value else f"{value:.2g}"


def _exposed(plan: Plan) -> float:
    """Return the share of communication in a step that nothing hides, in thousandths."""
    return round(plan.time.exposed / plan.time.seconds, 3)


def _total(plan: Plan) -> float:
    return plan.candidate.fullest.total
