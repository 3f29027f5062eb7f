"""Raw data in shards, and rows in slices."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vl.data.prepare import row_plan
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from tests.helpers.data.jobs import NUM_TARS, recipe_file
from tests.helpers.data.prepared import png, write_raw
from tests.helpers.data.reading import write_tar


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge is cut into several units of work too."""
    monkeypatch.setattr(row_plan, "SLICE_BYTES", 3000)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twelve tars of captions, some of them unusable, and a text file in four shards."""
    write_raw(tmp_path)
    for number in range(3, NUM_TARS):
        members = [("a.png", png(number)), ("a.txt", b"a shade"), ("b.png", b"broken"), ("b.txt", b"nothing")]
        write_tar(tmp_path / "captions" / f"{number:05d}.tar", members)
    return tmp_path


@pytest.fixture
def recipe(raw: Path) -> DataRecipe:
    return load_recipe(recipe_file(raw))
