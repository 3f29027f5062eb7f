"""A share of a phase of a preparation, and all shares of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vl.data.prepare.phases import Outcome, Phase, Settings, run_phase
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.share import Share
from megatron_vl.data.prepare.workers import this_process


def run(recipe: DataRecipe, prefix: Path, phase: Phase, index: int = 0, count: int = 1, **settings: Any) -> Outcome:
    pool = settings.pop("pool", None) or this_process()
    return run_phase(recipe, prefix, phase, Settings(Share(index, count), pool, progress=False, **settings))


def run_all(recipe: DataRecipe, prefix: Path, phase: Phase, count: int) -> list[str]:
    return [run(recipe, prefix, phase, index, count).line for index in range(count)]
