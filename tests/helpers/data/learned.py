"""What preparation makes of small sources: the samples kept, and how many records were left out for which reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.prepare.part_files import KEPT, read_index
from megatron_vl.data.prepare.parts import part_prefix, plan_units, write_part
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from tests.helpers.data.prepared import write_recipe


def recipe_of(folder: Path, type_: str, **options: Any) -> DataRecipe:
    """The recipe of one source named s; ``exif_orientation`` is that of the recipe."""
    common = {key: options.pop(key) for key in ("exif_orientation",) if key in options}
    entry = {"name": "s", "type": type_, **options}
    return load_recipe(write_recipe(folder, sources=[entry], seq_length=512, **common))


def outcomes(folder: Path, type_: str, **options: Any) -> Counter[str]:
    """How many records were kept ("kept"), and left out for each reason."""
    return counted(recipe_of(folder, type_, **options), folder)


def counted(recipe: DataRecipe, folder: Path) -> Counter[str]:
    found = Counter[str]()
    for unit in plan_units(recipe):
        write_part(recipe, unit, folder)
        index = read_index(part_prefix(folder, unit))
        assert index is not None
        names = [*index.reasons, "kept"]
        found.update(names[outcome] for outcome in np.where(index.outcomes == KEPT, -1, index.outcomes).tolist())
    return found
