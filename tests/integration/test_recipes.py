"""Each recipe that is shipped, scaled down in sizes only: at every layout, interrupted, in both precisions.

Ten steps at any layout equal ten steps of one process; a run that saves, validates, is interrupted and goes on equals
one that does not, in every byte of its last checkpoint; and one that goes on at another layout, with another kind of
optimizer, has the same losses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.tensors import open_checkpoint
from megatron_vl.config.schema import RunConfig
from megatron_vl.training import trainer
from tests.helpers.ranks import RankPools, Start
from tests.helpers.recipes import MODEL, RECIPES, STEPS, Case, prepare_data_sets
from tests.helpers.tiny import tiny_config
from tests.parallel.saving import save_fresh_weights

HALF = STEPS // 2
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VISION = {"vision_parallel": "data"}
SHARDED, WHOLE = {"use_distributed_optimizer": True}, {"use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, SHARDED),
    "tp2-sp": (2, TP2 | {"sequence_parallel": True} | SHARDED),
    "pp2": (2, PP2 | WHOLE),
    "dp2": (2, WHOLE),
    "dp2-shard-overlap": (2, SHARDED | OVERLAP),
    "pp2-vp2": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2} | SHARDED),
    "dp4-shard": (4, SHARDED),
    "pp4": (4, {"pipeline_model_parallel_size": 4} | SHARDED),
    "tp2-pp2": (4, TP2 | PP2 | WHOLE),
    "pp2-dp2-overlap": (4, PP2 | SHARDED | OVERLAP),
    "tp2-vision": (2, TP2 | VISION | WHOLE),
    "tp2-sp-dp2-vision-overlap": (4, TP2 | VISION | {"sequence_parallel": True} | SHARDED | OVERLAP),
    "pp2-vp2-vision": (2, PP2 | VISION | {"virtual_pipeline_model_parallel_size": 2} | SHARDED),
}
MANY = [name for name in LAYOUTS if name != "one"]


def train_on_rank(start: Start, config: RunConfig) -> None:
    """Train as ``tools/train.py`` does, in these ranks."""
    with mock.patch.object(trainer, "Topology", start.topology):
        trainer.train(config)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves in its directory."""

    root: Path

    @property
    def losses(self) -> list[float]:
        """Of each step, in order."""
        return [record["lm_loss"] for record in self._log if "lm_loss" in record]

    @property
    def validated(self) -> list[int]:
        """Steps after which there was a validation."""
        return [record["iteration"] for record in self._log if "lm_loss" not in record]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the last checkpoint, whole."""
        return dict(open_checkpoint(self.root))

    @property
    def progress(self) -> dict[str, Any]:
        """What the last checkpoint says of the data: rows, samples and tokens so far, and which."""
        state: dict[str, Any] = json.loads((store.resolve(self.root) / "state.json").read_text())
        return state

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of the last checkpoint that do not name its directory."""
        files = store.read_manifest(store.resolve(self.root))["files"]
        return {name: file["sha256"] for name, file in files.items() if name not in ("config.yaml", ".metadata")}

    @property
    def _log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Runs:
    """Runs of the recipes; one that has been made is not made again."""

    ranks: RankPools
    folder: Path

    def case(self, recipe: str) -> Case:
        """The recipe with data."""
        return Case(recipe, self._data_sets(), self._start())

    def train(self, recipe: str, layout: str, root: Path, **sections: dict[str, Any]) -> Outcome:
        """Run a recipe into ``root``."""
        world_size, parallel = LAYOUTS[layout]
        sections["checkpoint"] = {"save": str(root)} | sections.get("checkpoint", {})
        config = self.case(recipe).config(parallel=parallel, **sections)
        self.ranks(world_size).run(train_on_rank, config)
        return Outcome(root)

    @cache  # noqa: B019 - it lives as long as the module's fixture
    def straight(self, recipe: str, layout: str, bf16: bool = False) -> Outcome:
        """Without interruption; one checkpoint, at the end."""
        root = self.folder / "straight" / f"{recipe}-{layout}-{bf16}"
        return self.train(recipe, layout, root, training={"bf16": bf16})

    @cache  # noqa: B019
    def interrupted(self, recipe: str, layout: str, bf16: bool = False) -> Outcome:
        """One command, given twice: the run stops half-way; it saves and validates in between."""
        root = self.folder / "interrupted" / f"{recipe}-{layout}-{bf16}"
        sections: dict[str, dict[str, Any]] = {
            "training": {"bf16": bf16, "exit_interval": HALF, "eval_interval": 3, "eval_iters": 1},
            "data": {"valid_data_path": (self._data_sets()["images"],)},
        }
        for _ in range(2):
            outcome = self.train(recipe, layout, root, checkpoint={"auto_resume": True, "save_interval": 2}, **sections)
        return outcome

    @cache  # noqa: B019
    def _data_sets(self) -> dict[str, str]:
        return prepare_data_sets(self.folder)

    @cache  # noqa: B019
    def _start(self) -> Path:
        self.ranks(1).run(save_fresh_weights, replace(tiny_config(), model=MODEL), self.folder / "start")
        return self.folder / "start"


@pytest.fixture(scope="module")
def runs(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("recipes"))


def _cases(layouts: list[str], chosen: Callable[[int], list[str]]) -> list[Any]:
    """Every recipe at every layout; marked long but for those that are ``chosen`` by the number of the recipe."""
    return [
        pytest.param(recipe, layout, marks=() if layout in chosen(number) else pytest.mark.long)
        for number, recipe in enumerate(RECIPES)
        for layout in layouts
    ]


def _turn(number: int, *places: int) -> list[str]:
    """Layouts that take turns over the recipes, so that every one is taken."""
    return [MANY[(2 * number + place) % len(MANY)] for place in places]


def test_every_recipe_is_a_case_and_every_layout_has_one() -> None:
    assert {"qwen_vl-stage2_multitask", "tiny-stage0_text"} <= RECIPES.keys()
    assert {layout for number in range(len(RECIPES)) for layout in _turn(number, 0, 1)} == set(MANY)


@pytest.mark.parametrize(("recipe", "layout"), _cases(MANY, lambda number: _turn(number, 0, 1)))
def test_ten_steps_at_any_layout_equal_one_process(runs: Runs, recipe: str, layout: str) -> None:
    """The change of every tensor is compared, which is small beside the tensor itself."""
    one, many = runs.straight(recipe, "one"), runs.straight(recipe, layout)
    assert many.losses == pytest.approx(one.losses, rel=1e-6)
    assert many.progress == one.progress
    start, expected, found = dict(open_checkpoint(runs.case(recipe).start)), one.weights, many.weights
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        change, other = weight - start[name], found[name] - start[name]
        assert (other - change).norm() <= 1e-3 * change.norm(), name


@pytest.mark.parametrize(("recipe", "layout"), _cases(list(LAYOUTS), lambda number: _turn(number, 0)))
def test_an_interrupted_run_ends_with_the_same_bytes(runs: Runs, recipe: str, layout: str) -> None:
    _assert_same_bytes(runs.interrupted(recipe, layout), runs.straight(recipe, layout))


@pytest.mark.parametrize(("recipe", "layout"), _cases(list(LAYOUTS), lambda number: _turn(number, 1) * (number % 2)))
def test_an_interrupted_run_in_bf16_ends_with_the_same_bytes(runs: Runs, recipe: str, layout: str) -> None:
    _assert_same_bytes(runs.interrupted(recipe, layout, bf16=True), runs.straight(recipe, layout, bf16=True))


def _assert_same_bytes(interrupted: Outcome, straight: Outcome) -> None:
    assert interrupted.losses == straight.losses
    assert interrupted.validated == [3, 6, 9, 10]
    assert store.steps_in(interrupted.root) == [2, 4, 5, 6, 8, 10]
    assert interrupted.hashes == straight.hashes


@pytest.mark.parametrize(("recipe", "layout"), _cases(MANY, lambda number: _turn(number, 2)))
def test_a_run_goes_on_at_another_layout(runs: Runs, tmp_path: Path, recipe: str, layout: str) -> None:
    """From the checkpoint of a layout whose optimizer may be of the other kind; rows, losses and progress go on."""
    one = runs.straight(recipe, "one")
    saved = runs.interrupted(recipe, _turn(list(RECIPES).index(recipe), 0)[0])
    source = {"load": str(store.directory_of(saved.root, HALF)), "pretrained_checkpoint": None}
    resumed = runs.train(recipe, layout, tmp_path, checkpoint=source)
    assert resumed.losses == pytest.approx(one.losses[HALF:], rel=1e-5)
    assert resumed.progress == one.progress
