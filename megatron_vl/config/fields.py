"""The configuration tree as a flat list of fields: dotted path, command-line flag, type, documentation.

Everything that reads or writes configurations (recipe, flags, help, dump) walks this list, which is derived from the
dataclasses of ``schema.py``; so a field is declared once. Values from a recipe have YAML's types and values from the
command line are text; both become the field's type here, strictly: nothing is guessed, and what does not fit is
answered with the place, the value and the type that was expected.

Invariant: every leaf of the tree has exactly one flag and no two leaves share one.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.config import schema, synonyms
from megatron_vl.config.schema import ResamplerConfig, RunConfig, VisionConfig
from megatron_vl.errors import ConfigError

FLAG_PREFIXES: dict[type, str] = {VisionConfig: "vision_", ResamplerConfig: "resampler_"}
"""Sections whose field names repeat those of the language model."""

Scalar = bool | int | float | str
Value = Scalar | tuple[str, ...] | None


@dataclass(frozen=True)
class FieldSpec:
    """One leaf of the configuration tree."""

    path: tuple[str, ...]
    """Keys from the root, for example ("training", "train_iters")."""
    flag: str
    """The long option, for example --train-iters."""
    base: type
    """bool, int, float, str, or tuple for a list of strings."""
    choices: tuple[str, ...]
    """Permitted strings; empty if any value of the type will do."""
    optional: bool
    """Whether ``None`` is a value."""
    default: Value
    section: type
    """The dataclass that declares the field."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def expected(self) -> str:
        """The type in words, for messages and help."""
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        text = words.get(self.base, "a list of strings")
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        return f"{text}, or none" if self.optional else text


def iterate_fields(section: type = RunConfig, path: tuple[str, ...] = ()) -> Iterator[FieldSpec]:
    """Yield every leaf under ``section`` in the order of declaration."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        here = (*path, item.name)
        if dataclasses.is_dataclass(kind):
            yield from iterate_fields(typing.cast(type, kind), here)
            continue
        base, choices, optional = _describe(kind)
        name = FLAG_PREFIXES.get(section, "") + item.name
        flag = "--" + name.replace("_", "-")
        default = typing.cast(Value, item.default)
        yield FieldSpec(here, flag, base, choices, optional, default, section)


def section_paths(section: type = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Yield the path and the dataclass of every section, the root included."""
    yield path, section
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from section_paths(typing.cast(type, kind), (*path, item.name))


def _describe(kind: Any) -> tuple[type, tuple[str, ...], bool]:
    """Split an annotation into (base type, choices, optional)."""
    optional = False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        assert len(members) == 1, f"the schema may only join one type and None, found {kind}"
        kind, optional = members[0], True
    if typing.get_origin(kind) is Literal:
        return str, typing.get_args(kind), optional
    if typing.get_origin(kind) is tuple:
        return tuple, (), optional
    assert kind in (bool, int, float, str), f"the schema has a field of unsupported type {kind}"
    return kind, (), optional


def read_docs() -> dict[tuple[str, str], str]:
    """Return the string under each field of the schema by (class name, field name), class docstrings under ""."""
    docs: dict[tuple[str, str], str] = {}
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs[node.name, ""] = _one_line(ast.get_docstring(node) or "")
        for field, below in zip(node.body, node.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[node.name, name] = _one_line(text)
    return docs


def _one_line(text: str) -> str:
    return " ".join(text.split())


def from_yaml(spec: FieldSpec, value: object, where: str) -> Value:
    """Turn a value that YAML has parsed into the field's type.

    Text is accepted for a number, since YAML 1.1 reads ``1e-4`` as a string. Raises ``ConfigError`` naming ``where``.
    """
    if value is None and spec.optional:
        return None
    if spec.base is tuple:
        if isinstance(value, list) and all(_is_word(item) for item in value):
            return tuple(str(item) for item in value)
    elif spec.base is bool or isinstance(value, bool):
        if spec.base is bool and isinstance(value, bool):
            return value
    elif spec.base is float and isinstance(value, int | float):
        return from_text(spec, repr(value), where)
    elif spec.base is int and isinstance(value, int):
        return value
    elif spec.base in (float, str) and isinstance(value, str):
        return from_text(spec, value, where)
    raise _wrong_type(spec, value, where)


def from_text(spec: FieldSpec, text: str | Sequence[str], where: str) -> Value:
    """Turn command-line text into the field's type (``none`` clears an optional field); raises ``ConfigError``."""
    if not isinstance(text, str):
        return tuple(text)
    if spec.optional and text.lower() == "none":
        return None
    try:
        if spec.base is int:
            return int(text)
        if spec.base is float and math.isfinite(number := float(text)):
            return number
    except ValueError:
        raise _wrong_type(spec, text, where) from None
    if spec.base is not str or (spec.choices and text not in spec.choices):
        raise _wrong_type(spec, text, where)
    return text


def _is_word(value: object) -> bool:
    """A data path entry may be written without quotes although YAML reads a weight as a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _wrong_type(spec: FieldSpec, value: object, where: str) -> ConfigError:
    message = f"{where}: {spec.dotted} is {describe_value(value)}; expected {spec.expected}"
    if spec.choices and isinstance(value, str):
        message += suggestion(value, spec.choices)
    if spec.base is str and isinstance(value, bool | int | float):
        message += ". Put the value in quotes if it is meant as text"
    if spec.base is tuple and isinstance(value, str):
        message += f", for example [{value}]"
    return ConfigError(message)


def describe_value(value: object) -> str:
    """Name a value and its type in YAML's words."""
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    kinds: tuple[tuple[type, str], ...] = (
        (str, "a string"), (int, "an integer"), (float, "a number"), (list, "a list"), (dict, "a mapping")
    )
    for kind, words in kinds:
        if isinstance(value, kind):
            return f"{value!r} ({words})"
    return "empty" if value is None else repr(value)


NEAR = 0.75
"""Similarity (``difflib``) from which a name is a likely slip of another; below it a suggestion misleads."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name of which ``name`` is a likely slip, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=NEAR)), None)


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return ". Did you mean X?" for the nearest valid name, or nothing where none is near."""
    near = nearest(name, valid)
    return f". Did you mean {near}?" if near else ""


def suggest_field(name: str, shown: Callable[[FieldSpec], str], siblings: Iterable[str]) -> str:
    """Return what to say of a name that is no field: the field it means elsewhere, a note, or the nearest sibling.

    Args:
        name: as the user wrote it.
        shown: how a field is written where the name stands, for example its flag.
        siblings: valid names there, to compare with ``name``.
    """
    key = name.lstrip("-").lower().replace("-", "_")
    meant = [spec for spec in iterate_fields() if spec.path[-1] == key or spec.dotted == synonyms.FIELDS.get(key)]
    if meant:
        return f". Did you mean {' or '.join(map(shown, meant))}?"
    if note := synonyms.note(key):
        return f". {note}"
    return suggestion(name, siblings)
