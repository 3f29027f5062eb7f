"""Say what would help where no layout fits: only what was calculated to help.

More GPUs split the model and its optimizer further, but not without end: a rank holds at least a layer with its
activations, or the head. So larger numbers of GPUs are surveyed, with the choices that need least memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_vl.config.load import Overrides
from megatron_vl.planning.gpus import GPUS
from megatron_vl.planning.memory import USABLE
from megatron_vl.planning.plans import Candidate, Question
from megatron_vl.planning.survey import MICRO, RECOMPUTE, SHARDED, VIRTUAL, Survey, applied

_SMALLEST: Overrides = {MICRO: 1, RECOMPUTE: "full", SHARDED: True, VIRTUAL: None}
"""The values that need least memory."""
_DOUBLINGS = 6
"""Up to 64 times as many GPUs are tried."""


def nothing_fits(question: Question, valid: Sequence[Candidate]) -> str:
    """Return what is said where none of the valid combinations fits."""
    one = min(valid, key=lambda candidate: candidate.fullest.total)
    needed, gpu = one.fullest.total, question.gpu
    told = (
        f"nothing fits {question.num_gpus} x {gpu.name}: the smallest need is {needed / 1e9:.1f} GB on the fullest "
        f"rank ({one.family}, micro-batch {one.config.training.micro_batch_size}), and {gpu.memory / 1e9:.0f} GB x "
        f"{question.usable:g} = {_gb(question.limit)} are usable."
    )
    larger, smallest = _more_gpus(question)
    helps = [*_other_settings(question, needed), *([larger] if larger else [])]
    if helps:
        return f"{told} What helps: {'; '.join(helps)}"
    if smallest is None:
        return f"{told} No larger number of GPUs divides this batch, and no other GPU has the memory"
    return (
        f"{told} Neither another GPU nor more of them help: the fullest of {smallest.num_gpus:,} ranks still needs "
        f"{_gb(smallest.fullest.total)}"
    )


def _other_settings(question: Question, needed: float) -> Iterator[str]:
    """Yield what helps on as many GPUs."""
    if question.usable < USABLE and needed <= USABLE * question.gpu.memory:
        yield f"--usable-memory {USABLE:g}, as usual"
    if question.fixed:
        free = _smallest(replace(question, fixed=frozenset()))
        if free is not None and free.fullest.total <= question.limit:
            yield f"without the flags that set the layout, {free.family} needs {_gb(free.fullest.total)}"
    larger = [other.name for other in GPUS.values() if question.usable * other.memory >= needed]
    if larger:
        yield f"--gpu {' or '.join(larger)}"


def _more_gpus(question: Question) -> tuple[str | None, Candidate | None]:
    """Return the smallest of the doubled numbers of GPUs that helps, and the smallest need of all of them."""
    smallest: Candidate | None = None
    for doubling in range(1, _DOUBLINGS + 1):
        found = _smallest(replace(question, num_gpus=question.num_gpus * 2**doubling))
        if found is None:
            continue
        if found.fullest.total <= question.limit:
            return f"--gpus {found.num_gpus}, where {found.family} needs {_gb(found.fullest.total)}", found
        if smallest is None or found.fullest.total < smallest.fullest.total:
            smallest = found
    return None, smallest


def _smallest(question: Question) -> Candidate | None:
    """Return the combination that needs least memory, or None if there is none."""
    values = {name: value for name, value in _SMALLEST.items() if name not in question.fixed}
    if question.config.parallel.pipeline_layout != "auto":
        values.pop(VIRTUAL, None)  # the written stages decide it
    fixed = question.fixed | values.keys()
    survey = Survey(replace(question, config=applied(question.config, values), fixed=frozenset(fixed)))
    survey.look()
    return min(survey.valid, key=lambda candidate: candidate.fullest.total, default=None)


def _gb(num_bytes: float) -> str:
    """Return gigabytes with a digit, or more where they are few."""
    size = num_bytes / 1e9
    return f"{size:.1f} GB" if size >= 1 or not size else f"{size:.2g} GB"
