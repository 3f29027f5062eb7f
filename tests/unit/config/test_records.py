"""Records are built strictly from mappings, and what does not fit is named with its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from megatron_vl.config.records import Between, Builder
from megatron_vl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """A record within another one."""

    size: Annotated[int, Between(1, 9)] = 1


@dataclass(frozen=True)
class Record:
    """One field of every kind."""

    name: str
    share: Annotated[float, Between(above=0)] = 1.0
    quiet: bool = False
    mode: Literal["red", "green"] = "red"
    limit: int | None = None
    path: Path | None = None
    names: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    first: Part = field(default_factory=Part)
    amounts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a contradiction."""
        if self.quiet and self.names:
            raise ValueError("who is quiet names nobody")


def test_every_kind_of_field() -> None:
    values = {
        "name": "a", "share": "1e-2", "quiet": False, "mode": "green", "limit": None, "path": "b/c", "names": ["x"],
        "parts": [{"size": 2}, {}], "first": Part(3), "amounts": {"k": 5},
    }  # fmt: skip
    built = Builder(root=Path("/data")).build(Record, values, "a.yaml")
    parts = (Part(2), Part())
    expected = Record("a", 0.01, False, "green", None, Path("/data/b/c"), ("x",), parts, Part(3), {"k": 5})
    assert built == expected
    assert type(Builder().build(Record, {"name": "a", "share": 2}, "x").share) is float
    assert Builder().build(Record, built, "x") is built


def test_values_are_laid_over_those_of_another_record() -> None:
    base = Record("a", limit=3, names=("x",))
    assert Builder().build(Record, {"limit": None, "share": 0.5}, "x", base=base) == Record("a", 0.5, names=("x",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "a.yaml: found empty, expected a mapping"),
        ([], "a.yaml: found [] (a list), expected a mapping"),
        ({}, "a.yaml: name is missing; found the keys "),
        ({"name": "a", "limt": 3}, "a.yaml: unknown key 'limt'. Did you mean limit?"),
        ({"name": "a", 5: 3}, "a.yaml: unknown key 5; valid are amounts, first, limit, mode, name, names, parts, path, "
                              "quiet, share"),
        ({"name": 5}, "a.yaml: name: found 5 (an integer), expected a string. Put the value in quotes if it is meant "
                      "as text"),
        ({"name": None}, "a.yaml: name: found empty, expected a string"),
        ({"name": "a", "limit": True}, "a.yaml: limit: found true (a boolean), expected an integer, or none"),
        ({"name": "a", "limit": 1.0}, "a.yaml: limit: found 1.0 (a number), expected an integer, or none"),
        ({"name": "a", "limit": "1"}, "a.yaml: limit: found '1' (a string), expected an integer, or none"),
        ({"name": "a", "share": 0}, "a.yaml: share: found 0 (an integer), expected a number above 0"),
        ({"name": "a", "share": math.inf}, "a.yaml: share: found inf (a number), expected a number above 0"),
        ({"name": "a", "share": "nan"}, "a.yaml: share: found 'nan' (a string), expected a number above 0"),
        ({"name": "a", "share": 10**400}, f"a.yaml: share: found {10**59} (an integer), expected a number above 0"),
        ({"name": "a", "quiet": 1}, "a.yaml: quiet: found 1 (an integer), expected true or false"),
        ({"name": "a", "mode": "gren"}, "a.yaml: mode: found 'gren' (a string), expected one of red, green. Did you "
                                        "mean green?"),
        ({"name": "a", "mode": []}, "a.yaml: mode: found [] (a list), expected one of red, green"),
        ({"name": "a", "path": ""}, "a.yaml: path: found '' (a string), expected a path, or none"),
        ({"name": "a", "names": "b"}, "a.yaml: names: found 'b' (a string), expected a list of strings, for example "
                                      "[b]"),
        ({"name": "a", "names": ["b", 1]}, "a.yaml: names[1]: found 1 (an integer), expected a string. Put the value "
                                           "in quotes if it is meant as text"),
        ({"name": "a", "parts": [{}, {"size": 0}]}, "a.yaml: parts[1].size: found 0 (an integer), expected an integer "
                                                    "from 1 to 9"),
        ({"name": "a", "first": {"sise": 1}}, "a.yaml: first: unknown key 'sise'. Did you mean size?"),
        ({"name": "a", "amounts": {"k": "x"}}, "a.yaml: amounts.k: found 'x' (a string), expected an integer"),
        ({"name": "a", "names": ["b"], "quiet": True}, "a.yaml: who is quiet names nobody"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Builder().build(Record, values, "a.yaml")
    assert str(caught.value) == message


def test_a_file_of_ours_may_be_newer() -> None:
    ours = Builder(DataError, ours=True)
    assert ours.build(Record, {"name": "a", "later": 1, "share": math.inf}, "x") == Record("a", math.inf)
    with pytest.raises(DataError, match="x: name is missing for a test; found the keys later"):
        Builder(DataError, ours=True, purpose=" for a test").build(Record, {"later": 1}, "x")
