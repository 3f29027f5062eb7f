"""YAML in which no key is given twice, in recipes of runs and of data sets; anchors may repeat what they like."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_vl.config.strict_yaml import parse_yaml
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.errors import ConfigError


def test_values_and_the_lines_of_their_keys() -> None:
    values, lines = parse_yaml("a: 1\nb:\n  - {c: 2}\n  - c: 3\n", "f")
    assert values == {"a": 1, "b": [{"c": 2}, {"c": 3}]}
    assert lines == {("a",): 1, ("b",): 2, ("b[0]", "c"): 3, ("b[1]", "c"): 4}
    assert parse_yaml("", "f") == (None, {}) and parse_yaml("- {c: 2}", "f")[1] == {("[0]", "c"): 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "f:3: a is given twice, first in line 1"),
        ("a:\n  b: {c: 1,\n c: 1}", "f:3: a.b.c is given twice, first in line 2"),
        ("a:\n- {b: 1}\n- b: 1\n  b: 2", "f:4: a[1].b is given twice, first in line 3"),
        ("- - {b: 1, b: 2}", "f:1: [0][0].b is given twice, first in line 1"),
    ],
)
def test_a_key_given_twice_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f")
    assert str(caught.value) == said


@pytest.mark.parametrize("text", ["a: [", "? [a]\n: b", "when: 2024-13-01", "!!python/object:x {}"])
def test_what_is_no_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text, "f")


def test_anchors_repeat_and_even_contain_themselves() -> None:
    merged, _ = parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a\n", "f")
    assert merged == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 1}}
    assert parse_yaml("&a {b: *a}", "f")[1] == {("b",): 1}
    steps = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30))
    assert len(parse_yaml(f"a0: &a0 x\n{steps}", "f")[1]) == 31


def test_a_data_recipe_gives_no_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("sources:\n- name: a\n  limit: 5\n  type: text\n  path: a.jsonl\n  limit: 50\n")
    with pytest.raises(ConfigError, match=r"data\.yaml:6: sources\[0\]\.limit is given twice, first in line 3"):
        load_recipe(path)
