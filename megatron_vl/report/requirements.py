"""The requirements on a run, and whether it meets them.

Every requirement is computed from the records alone. A requirement without a measured value counts as not met.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.evaluation.scoring import VQA_ACCURACY, Score
from megatron_vl.report.records import Check, HeldOutLoss, Model

VQA_MARGIN = 0.20
LOSS_TASKS = ("caption", "vqa", "referring", "ocr")
LANGUAGE_MODEL_UNCHANGED = "language_model_unchanged"

GOALS: dict[str, dict[str, float]] = {
    "smoke": {},
    "quickstart": {},
    "learn": {"vqa": 0.95, "caption": 0.75, "referring": 0.30, "ocr": 0.30},
}
"""Scores that a profile requires, in addition to the requirements of every profile."""


@dataclass(frozen=True)
class Requirement:
    """One requirement, the measured value, and the verdict."""

    what: str
    required: str
    found: str
    met: bool


@dataclass(frozen=True)
class Findings:
    """The results of a run about its models."""

    scores: Mapping[Model, Mapping[str, Score]]
    losses: Sequence[HeldOutLoss]
    checks: Sequence[Check]


def judge(profile: str, findings: Findings) -> tuple[Requirement, ...]:
    """Return the requirements of a profile, in the order of the pipeline."""
    requirements = [
        _unchanged_requirement(findings.checks),
        _loss_requirement("stage1", "caption", findings.losses),
        _vqa_requirement(findings),
    ]
    requirements += [_loss_requirement("stage2", task, findings.losses) for task in LOSS_TASKS]
    requirements += [_goal_requirement(task, goal, findings.scores) for task, goal in GOALS.get(profile, {}).items()]
    return tuple(requirements)


def _unchanged_requirement(checks: Iterable[Check]) -> Requirement:
    check = next((check for check in checks if check.name == LANGUAGE_MODEL_UNCHANGED), None)
    return Requirement(
        what="Stage 1 leaves the language model as it was",
        required="every tensor bit-identical",
        found="not measured" if check is None else check.detail,
        met=check is not None and check.passed,
    )


def find_loss(losses: Iterable[HeldOutLoss], stage: str, model: Model, task: str) -> float | None:
    """Return the held-out loss of a model after a stage, or None if it was not measured."""
    matching = (x.loss for x in losses if (x.stage, x.model, x.task) == (stage, model, task))
    return next(matching, None)


def _loss_requirement(stage: str, task: str, losses: Sequence[HeldOutLoss]) -> Requirement:
    with_images, without_images = (find_loss(losses, stage, model, task) for model in ("model", "blind"))
    return Requirement(
        what=f"Held-out loss on {task} after stage {stage.removeprefix('stage')}",
        required="below the blind model's" + ("" if without_images is None else f" {without_images:.3f}"),
        found="not measured" if with_images is None else f"{with_images:.3f}",
        met=with_images is not None and without_images is not None and with_images < without_images,
    )


def _vqa_requirement(findings: Findings) -> Requirement:
    scores = [findings.scores.get(model, {}).get("vqa") for model in ("model", "blind")]
    with_images, without_images = (None if score is None else score.value for score in scores)
    metric = next((score.metric for score in scores if score), VQA_ACCURACY)
    required = f"at least {100 * VQA_MARGIN:.0f} points above the blind model"
    return Requirement(
        what=f"{metric} on vqa after stage 2",
        required=required if without_images is None else f"{required}'s {100 * without_images:.1f} %",
        found="not measured" if with_images is None else f"{100 * with_images:.1f} %",
        met=with_images is not None and without_images is not None and with_images >= without_images + VQA_MARGIN,
    )


def _goal_requirement(task: str, goal: float, scores: Mapping[Model, Mapping[str, Score]]) -> Requirement:
    score = scores.get("model", {}).get(task)
    return Requirement(
        what=f"Score on {task}" + (f" ({score.metric})" if score else ""),
        required=f"at least {100 * goal:.0f} %",
        found="not measured" if score is None else f"{100 * score.value:.1f} %",
        met=score is not None and score.value >= goal,
    )
