"""The bars that a run has to clear, and whether it did.

Every bar is worked out from the records alone. A figure that the run did not produce leaves its bar open,
which counts as missed: nothing is met by silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.evaluation.records import Check, HeldOutLoss, Model
from megatron_vl.evaluation.scoring import VQA_ACCURACY, Score

VQA_MARGIN = 0.20
LOSS_TASKS = ("caption", "vqa", "referring", "ocr")
LANGUAGE_MODEL_UNCHANGED = "language_model_unchanged"

GOALS: dict[str, dict[str, float]] = {
    "smoke": {},
    "quickstart": {},
    "learn": {"vqa": 0.95, "caption": 0.75, "referring": 0.30, "ocr": 0.30},
}
"""Scores that a profile has to reach, beside the bars that hold for every profile."""


@dataclass(frozen=True)
class Bar:
    """One requirement, what was found, and the verdict."""

    what: str
    required: str
    found: str
    met: bool


@dataclass(frozen=True)
class Findings:
    """What a run found out about its models."""

    scores: Mapping[Model, Mapping[str, Score]]
    losses: Sequence[HeldOutLoss]
    checks: Sequence[Check]


def judge(profile: str, findings: Findings) -> tuple[Bar, ...]:
    """The bars of a profile, in the order of the pipeline."""
    bars = [
        _unchanged_bar(findings.checks),
        _loss_bar("stage1", "caption", findings.losses),
        _vqa_bar(findings),
    ]
    bars += [_loss_bar("stage2", task, findings.losses) for task in LOSS_TASKS]
    bars += [_goal_bar(task, goal, findings.scores) for task, goal in GOALS.get(profile, {}).items()]
    return tuple(bars)


def _unchanged_bar(checks: Iterable[Check]) -> Bar:
    check = next((check for check in checks if check.name == LANGUAGE_MODEL_UNCHANGED), None)
    return Bar(
        what="Stage 1 leaves the language model as it was",
        required="every tensor bit-identical",
        found="not measured" if check is None else check.detail,
        met=check is not None and check.passed,
    )


def find_loss(losses: Iterable[HeldOutLoss], stage: str, model: Model, task: str) -> float | None:
    """The held-out loss of a model after a stage, or None if it was not measured."""
    matching = (x.loss for x in losses if (x.stage, x.model, x.task) == (stage, model, task))
    return next(matching, None)


def _loss_bar(stage: str, task: str, losses: Sequence[HeldOutLoss]) -> Bar:
    sighted, blind = (find_loss(losses, stage, model, task) for model in ("sighted", "blind"))
    return Bar(
        what=f"Held-out loss on {task} after stage {stage.removeprefix('stage')}",
        required="below the blind model's" if blind is None else f"below the blind model's {blind:.3f}",
        found="not measured" if sighted is None else f"{sighted:.3f}",
        met=sighted is not None and blind is not None and sighted < blind,
    )


def _vqa_bar(findings: Findings) -> Bar:
    scores = [findings.scores.get(model, {}).get("vqa") for model in ("sighted", "blind")]
    sighted, blind = (None if score is None else score.value for score in scores)
    metric = next((score.metric for score in scores if score), VQA_ACCURACY)
    required = f"at least {100 * VQA_MARGIN:.0f} points above the blind model"
    return Bar(
        what=f"{metric} on vqa after stage 2",
        required=required if blind is None else f"{required}'s {100 * blind:.1f} %",
        found="not measured" if sighted is None else f"{100 * sighted:.1f} %",
        met=sighted is not None and blind is not None and sighted >= blind + VQA_MARGIN,
    )


def _goal_bar(task: str, goal: float, scores: Mapping[Model, Mapping[str, Score]]) -> Bar:
    score = scores.get("sighted", {}).get(task)
    return Bar(
        what=f"Score on {task}" + (f" ({score.metric})" if score else ""),
        required=f"at least {100 * goal:.0f} %",
        found="not measured" if score is None else f"{100 * score.value:.1f} %",
        met=score is not None and score.value >= goal,
    )
