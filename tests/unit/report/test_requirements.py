"""The requirements on a run, and whether it meets them."""

from __future__ import annotations

from megatron_vl.evaluation.scoring import Score
from megatron_vl.report.records import Check, HeldOutLoss
from megatron_vl.report.requirements import LANGUAGE_MODEL_UNCHANGED, Findings, judge


def _findings(
    vqa_with_images: float, vqa_without_images: float, loss_with_images: float, *, unchanged: bool = True
) -> Findings:
    losses = [
        HeldOutLoss("stage1", "model", "caption", 1.0, 10),
        HeldOutLoss("stage1", "blind", "caption", 1.5, 10),
    ]
    for task in ("caption", "vqa", "referring", "ocr"):
        losses.append(HeldOutLoss("stage2", "model", task, loss_with_images, 10))
        losses.append(HeldOutLoss("stage2", "blind", task, 1.0, 10))
    scores = {
        "model": {"vqa": Score("vqa", "VQA accuracy", vqa_with_images, 10)},
        "blind": {"vqa": Score("vqa", "VQA accuracy", vqa_without_images, 10)},
    }
    return Findings(scores, losses, [Check(LANGUAGE_MODEL_UNCHANGED, unchanged, "39 of 39 tensors equal")])


def test_all_requirements_met() -> None:
    requirements = judge("quickstart", _findings(0.5, 0.3, 0.9))
    assert len(requirements) == 7
    assert all(item.met for item in requirements)


def test_each_requirement_can_be_missed() -> None:
    missed = [item.what for item in judge("quickstart", _findings(0.49, 0.3, 1.0, unchanged=False)) if not item.met]
    assert missed == [
        "Stage 1 leaves the language model as it was",
        "VQA accuracy on vqa after stage 2",
        *(f"Held-out loss on {task} after stage 2" for task in ("caption", "vqa", "referring", "ocr")),
    ]


def test_what_was_not_measured_is_missed() -> None:
    requirements = judge("learn", Findings({}, [], []))
    assert len(requirements) == 11
    assert not any(item.met for item in requirements)
    assert {item.found for item in requirements} == {"not measured"}
