"""The language models of two exported folders, compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_vl.report.checks import compare_language_models


def _folder(path: Path, **changes: torch.Tensor) -> Path:
    tensors = {
        "transformer.wte.weight": torch.arange(6.0).reshape(2, 3),
        "lm_head.weight": torch.ones(2, 3),
        "transformer.visual.proj": torch.zeros(2),
    }
    path.mkdir()
    save_file({**tensors, **changes}, path / "model.safetensors")
    return path


def test_vision_may_change_and_the_language_model_may_not(tmp_path: Path) -> None:
    before = _folder(tmp_path / "before")
    trained = _folder(tmp_path / "trained", **{"transformer.visual.proj": torch.ones(2)})
    check = compare_language_models(before, trained)
    assert check.passed
    assert check.detail == "2 of 2 tensors bit-identical"
    touched = torch.ones(2, 3)
    touched[0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    moved = _folder(tmp_path / "moved", **{"lm_head.weight": touched})
    assert compare_language_models(before, moved).detail == "1 of 2 tensors bit-identical"
    assert not compare_language_models(before, moved).passed


def test_signs_of_zero_and_strange_tensors_count(tmp_path: Path) -> None:
    before = _folder(tmp_path / "before", **{"lm_head.weight": torch.zeros(2, 3)})
    negative = _folder(tmp_path / "negative", **{"lm_head.weight": -torch.zeros(2, 3)})
    assert not compare_language_models(before, negative).passed
    more = _folder(tmp_path / "more", **{"lm_head.weight": torch.zeros(2, 3), "extra": torch.zeros(1)})
    assert compare_language_models(before, more).detail == "2 of 3 tensors bit-identical"
