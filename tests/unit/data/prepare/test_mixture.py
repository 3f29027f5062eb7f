"""Amounts and weights: proportions that hold, repetition that is bounded, and the paper's tables as recipes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.cli.prepare import main
from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.mixture import Supply, draw_samples, uses_before
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe, without_missing
from megatron_vl.errors import ConfigError
from tests.helpers.data.prepared import recipe_values, write_recipe

ROOT = Path(__file__).resolve().parents[4]
# The paper's Table 2 (cleaned, in millions) and Table 3 (in millions).
TABLE_2 = {
    "laion_en": 280, "laion_coco": 300, "datacomp": 300, "coyo": 200, "cc12m": 8, "cc3m": 3, "sbu": 0.8,
    "coco_caption": 0.6, "laion_zh": 105, "in_house_zh": 220,
}  # fmt: skip
TABLE_3 = {
    "captioning": (19.7, "laion_en laion_zh datacomp coyo cc12m cc3m sbu coco_caption in_house_zh"),
    "vqa": (3.6, "gqa vgqa vqav2 dvqa ocr_vqa docvqa textvqa chartqa_human chartqa_augmented ai2d"),
    "grounding": (3.5, "grit"),
    "referring": (8.7, "grit_referring vg_referring refcoco_referring refcoco_plus_referring refcocog_referring"),
    "grounded_captioning": (8.7, "grit_regions vg_regions refcoco_regions refcoco_plus_regions refcocog_regions"),
    "ocr": (24.8, "synthdog_en synthdog_zh pdf html"),
    "text": (7.8, "text"),
}


def qwen_vl(stage: int) -> DataRecipe:
    path = ROOT / "examples" / "qwen_vl" / "data" / f"stage{stage}.yaml"
    return load_recipe(path, {"num_queries": 256, "num_bpe_tokens": 151643}, root=Path("/raw"))


def drawn_by_source(recipe: DataRecipe, available: dict[str, int]) -> dict[str, int]:
    """What each source gives, when it has so many samples that are fit for use."""
    supplies = [Supply(available[entry.source.name], entry.weight, entry.group) for entry in recipe.sources]
    drawn = draw_samples(supplies, recipe.mixture.groups, recipe.mixture.max_repeats).counts
    return {entry.source.name: count for entry, count in zip(recipe.sources, drawn, strict=True)}


def test_stage_1_draws_table_2() -> None:
    recipe = qwen_vl(1)
    everything = {name: round(millions * 10**6) for name, millions in TABLE_2.items()}
    assert drawn_by_source(recipe, everything) == everything
    english = sum(everything[entry.source.name] for entry in recipe.sources if entry.source.language == "en")  # type: ignore[attr-defined]
    assert english / sum(everything.values()) == pytest.approx(0.773, abs=0.003)
    # With a hundredth of CC3M and all else, CC3M decides: the proportions are those of the table still.
    drawn = drawn_by_source(recipe, {**everything, "cc3m": 30_000})
    assert drawn == {name: count // 100 for name, count in everything.items()}
    assert recipe.longest_sample == 512


def test_stage_2_draws_table_3() -> None:
    recipe = qwen_vl(2)
    members = {entry.source.name: entry.group for entry in recipe.sources}
    assert members == {name: group for group, (_, names) in TABLE_3.items() for name in names.split()}
    for available in (40_000_000, 5_000):
        drawn = drawn_by_source(recipe, dict.fromkeys(members, available))
        total = sum(drawn.values())
        for group, (millions, _) in TABLE_3.items():
            mine = sum(count for name, count in drawn.items() if members[name] == group)
            assert mine / total == pytest.approx(millions / 76.8, rel=1e-3), group
        assert all(count <= available for count in drawn.values())
        if available == 40_000_000:
            assert total == 76_800_000
    tasks = {entry.group: getattr(entry.source, "task", None) for entry in recipe.sources if entry.group == "referring"}
    assert tasks == {"referring": "referring"}
    assert recipe.pack.mode == "task", "rows of one task, as in the paper"


def test_stage_3_draws_the_papers_number() -> None:
    assert sum(drawn_by_source(qwen_vl(3), {"dialogues": 400_000, "llava": 150_000}).values()) == 350_000
    assert drawn_by_source(qwen_vl(3), {"dialogues": 100, "llava": 0}) == {"dialogues": 100, "llava": 0}


SUPPLIES = st.lists(
    st.builds(Supply, st.integers(0, 500), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from(["a", "b", "c"])),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    SUPPLIES,
    st.fixed_dictionaries({"a": st.integers(1, 2000), "b": st.integers(1, 2000), "c": st.integers(1, 2000)}),
    st.sampled_from([0.5, 1.0, 2.5]),
)
def test_proportions_hold_and_repetition_is_bounded(
    supplies: list[Supply], amounts: dict[str, int], repeats: float
) -> None:
    drawn = draw_samples(supplies, amounts, repeats).counts
    of_group = {g: sum(c for c, s in zip(drawn, supplies, strict=True) if s.group == g) for g in amounts}
    have = {g: sum(s.available for s in supplies if s.group == g) for g in amounts}
    present = [g for g in amounts if have[g]]
    factors = []
    for group in amounts:
        assert of_group[group] <= min(amounts[group], Fraction(repeats) * have[group])
        if not have[group]:
            assert of_group[group] == 0
    for group in present:
        factors.append(Fraction(repeats) * have[group] / amounts[group])
    factor = min([Fraction(1), *factors])
    for group in present:
        assert of_group[group] == int(amounts[group] * factor)
        shares = [(c, s.available * s.weight) for c, s in zip(drawn, supplies, strict=True) if s.group == group]
        whole = sum(share for _, share in shares)
        assert all(abs(count - of_group[group] * share / whole) <= 1 for count, share in shares)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 2000))
def test_copies_are_spread_evenly(available: int, drawn: int) -> None:
    copies = np.diff(uses_before(np.arange(available + 1), available, drawn))
    assert len(copies) == available
    if available:
        assert copies.sum() == drawn
        assert copies.max() - copies.min() <= 1
        half = copies[: available // 2].sum()
        assert abs(half - drawn * (available // 2) / available) <= 1


def test_weights_are_taken_as_they_are_written() -> None:
    assert draw_samples([Supply(100, 0.29), Supply(10, 0.7), Supply(3, 2.5)], {}).counts == (29, 7, 7)


def test_a_weight_may_have_an_exponent(tmp_path: Path) -> None:
    """YAML takes 1e-1 for a text, as in the recipes of runs and in filters, where it counts as well."""
    values = recipe_values(mixture={"max_repeats": "2e0"})
    values["sources"][0]["weight"] = "1e-1"
    recipe = load_recipe(write_recipe(tmp_path, **values))
    assert (recipe.sources[0].weight, recipe.mixture.max_repeats) == (0.1, 2.0)
    values["sources"][0]["weight"] = "much"
    with pytest.raises(ConfigError, match="weight: found 'much', expected a number above 0"):
        load_recipe(write_recipe(tmp_path, **values))


def text_file(folder: Path, name: str, count: int) -> dict[str, Any]:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
    return {"name": name, "type": "text", "path": f"{name}.jsonl"}


def test_amounts_in_a_data_set(tmp_path: Path) -> None:
    sources = [
        {**text_file(tmp_path, "large", 60), "group": "web"},
        {**text_file(tmp_path, "small", 20), "group": "web"},
        {**text_file(tmp_path, "scarce", 10), "samples": "0.1K"},
    ]
    values = recipe_values(sources=sources, mixture={"groups": {"web": 400}, "max_repeats": 1})
    prepare(load_recipe(write_recipe(tmp_path, **values)), tmp_path / "set", progress=False)
    manifest = read_manifest(tmp_path / "set")
    # The scarce source has a tenth of its amount, so all give a tenth: 40 of the web, shared 3 to 1, and 10.
    assert {count.source: count.samples for count in manifest.counts} == {"large": 30, "small": 10, "scarce": 10}
    assert {(skip.source, skip.reason): skip.count for skip in manifest.skips} == {
        ("large", "not_drawn"): 30,
        ("small", "not_drawn"): 10,
    }
    values["mixture"]["max_repeats"] = 3
    prepare(load_recipe(write_recipe(tmp_path, **values)), tmp_path / "set", progress=False)
    manifest = read_manifest(tmp_path / "set")
    assert {count.source: count.samples for count in manifest.counts} == {"large": 90, "small": 30, "scarce": 30}
    assert manifest.skips == ()


@pytest.mark.parametrize(
    ("first", "mixture", "message"),
    [
        ({"samples": "10X"}, {}, r"sources\[0\].samples: found '10X', expected a number of samples such as"),
        ({"samples": 1.5}, {}, r"samples: found 1.5"),
        ({"samples": "0.0001K"}, {}, r"found '0.0001K'"),
        ({"samples": 10, "group": "g"}, {"groups": {"g": 1}}, "exclude each other"),
        ({"group": "g"}, {"groups": {"h": 1}}, "'g' has no amount in mixture.groups; known are h"),
        ({"group": "g"}, {}, "there is no such entry"),
        ({"samples": 10}, {}, r"sources\[1\] \(two\) has neither 'samples' nor 'group'"),
        ({}, {"groups": {"h": 1}}, "has neither"),
        ({}, {"group": {}}, "unknown key 'group'. Did you mean groups"),
        ({}, {"max_repeats": 0}, "max_repeats: found 0"),
    ],
)
def test_wrong_amounts_name_the_key(
    tmp_path: Path, first: dict[str, Any], mixture: dict[str, Any], message: str
) -> None:
    sources = [{**text_file(tmp_path, "one", 1), **first}, text_file(tmp_path, "two", 1)]
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path, sources=sources, mixture=mixture))


def test_missing_sources_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [{**text_file(tmp_path, "there", 5), "group": "a"}, {**text_file(tmp_path, "gone", 5), "group": "b"}]
    (tmp_path / "gone.jsonl").unlink()
    path = write_recipe(tmp_path, sources=sources, mixture={"groups": {"a": 5, "b": 500}})
    arguments = [str(path), "--output", str(tmp_path / "set"), "--workers", "1", "--quiet"]
    assert main(arguments) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert main([*arguments, "--skip-missing"]) == 0
    assert f"source gone is left out: {tmp_path / 'gone.jsonl'} is missing" in capsys.readouterr().out
    assert [count.samples for count in read_manifest(tmp_path / "set").counts] == [5]
    (tmp_path / "there.jsonl").unlink()
    with pytest.raises(ConfigError, match="files of all sources are missing"):
        without_missing(load_recipe(path))


def test_copies_do_not_overflow() -> None:
    """A million samples, each 70 million times, and three of them once more: sample x draws is beyond 64 bits."""
    found = np.diff(uses_before(np.arange(1_000_001), 1_000_000, 70_000_000_000_003))
    assert found.tolist().count(70_000_000) == 999_997
    assert np.flatnonzero(found == 70_000_001).tolist() == [333_333, 666_666, 999_999], "spread evenly"
