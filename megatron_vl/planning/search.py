"""Find the layouts of a run that fit a number of GPUs, and order them by their time.

``survey.py`` lists the valid combinations with their memory, ``step_time.py`` says how long a step of each takes.

A *family* is the combinations with the same tensor size, pipeline size, recomputation and place of the vision part. The
plans that are shown are the best of their families, since neighbors within a family differ little. Only combinations
whose lower bound may still be among the best are simulated.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.advice import nothing_fits
from megatron_vl.planning.plans import Answer, Candidate, Family, Plan, Question, in_thousandths
from megatron_vl.planning.step_time import fastest_possible, step_time
from megatron_vl.planning.survey import Survey

NUM_SHOWN = 5


def search(question: Question) -> Answer:
    """Return the best plans.

    Raises:
        ConfigError: if no combination is valid, or none fits; with the arithmetic and what would help.
    """
    survey = Survey(question)
    survey.look()
    if not survey.valid:
        lines = "\n".join(f"  {line}" for line in survey.invalid)
        raise ConfigError(f"no layout of {question.num_gpus} GPUs is valid for this run:\n{lines}")
    fitting = [one for one in survey.valid if one.fullest.total <= question.limit]
    if not fitting:
        raise ConfigError(nothing_fits(question, survey.valid))
    return Answer(
        plans=tuple(_best(question, fitting)),
        rejected=(*survey.invalid, *_too_large(question, survey.valid)),
        num_valid=len(survey.valid),
        num_fitting=len(fitting),
        num_fitting_families=len({one.family for one in fitting}),
    )


def _best(question: Question, fitting: Sequence[Candidate]) -> list[Plan]:
    """Return the best plan of each of the best families."""
    gpu, row, count = question.gpu, question.row, question.num_gpus
    bounds: dict[tuple[object, ...], float] = {}

    def bound(one: Candidate) -> float:
        # Sharding the optimizer does not change what ranks compute.
        key = (id(one.layout), one.config.training, *_computing(one.config))
        if key not in bounds:
            least = fastest_possible(one.config, one.layout, row, gpu, count)
            bounds[key] = least / one.config.training.global_batch_size
        return bounds[key]

    best: dict[Family, Plan] = {}
    for least, _, one in sorted((bound(one), number, one) for number, one in enumerate(fitting)):
        ranked = sorted(best.values(), key=_rank)[:NUM_SHOWN]
        if len(ranked) == NUM_SHOWN and least > ranked[-1].seconds_per_row:
            break
        known = best.get(one.family)
        if known is not None and least > known.seconds_per_row:
            continue
        plan = Plan(one, step_time(one.config, one.layout, row, gpu, count), gpu)
        if known is None or _rank(plan) < _rank(known):
            best[one.family] = plan
    return sorted(best.values(), key=_rank)[:NUM_SHOWN]


def _computing(config: RunConfig) -> tuple[object, ...]:
    """Return what decides a step's computation beside its layout."""
    parallel = config.parallel
    encoding = parallel.vision_micro_batch_size, parallel.vision_recompute, parallel.vision_recompute_granularity
    return parallel.sequence_parallel, *encoding


def _rank(plan: Plan) -> tuple[int, float]:
    """Order plans by time; among those whose times are the same in thousandths, by memory."""
    return in_thousandths(plan.seconds_per_row), plan.candidate.fullest.total


def _too_large(question: Question, valid: Sequence[Candidate]) -> list[str]:
    """Return a line for each family of which nothing fits."""
    smallest: dict[Family, float] = {}
    for one in valid:
        smallest[one.family] = min(one.fullest.total, smallest.get(one.family, float("inf")))
    gpu = question.gpu
    return [
        f"{family}: {size / 1e9:.1f} GB on the fullest rank > {gpu.memory / 1e9:.0f} GB x {question.usable:g}"
        for family, size in smallest.items()
        if size > question.limit
    ]
