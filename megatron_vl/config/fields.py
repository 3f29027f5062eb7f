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
import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.config import schema, synonyms
from megatron_vl.config.records import Builder, Shape
from megatron_vl.config.schema import ResamplerConfig, RunConfig, VisionConfig
from megatron_vl.config.suggestions import did_you_mean, suggestion

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
    shape: Shape
    """The type: bool, int, float, str, or tuple for a list of strings."""
    default: Value
    section: type
    """The dataclass that declares the field."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def iterate_fields(section: type = RunConfig, path: tuple[str, ...] = ()) -> Iterator[FieldSpec]:
    """Yield every leaf under ``section`` in the order of declaration."""
    yield from _leaves(section, path)


@functools.cache
def _leaves(section: type, path: tuple[str, ...]) -> tuple[FieldSpec, ...]:
    """Return the leaves under ``section``. A planner validates thousands of configurations."""
    return tuple(_read_leaves(section, path))


def _read_leaves(section: type, path: tuple[str, ...]) -> Iterator[FieldSpec]:
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        here = (*path, item.name)
        if dataclasses.is_dataclass(kind):
            yield from iterate_fields(typing.cast(type, kind), here)
            continue
        shape = Shape.of(kind)
        name = FLAG_PREFIXES.get(section, "") + item.name
        flag = "--" + name.replace("_", "-")
        default = typing.cast(Value, item.default)
        yield FieldSpec(here, flag, shape, default, section)


def section_paths(section: type = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Yield the path and the dataclass of every section, the root included."""
    yield path, section
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from section_paths(typing.cast(type, kind), (*path, item.name))


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
    """Return a value that YAML has parsed as the field's type; raises ``ConfigError`` naming ``where``."""
    if spec.shape.base is tuple and isinstance(value, list):
        # A weight may be written without quotes although YAML reads it as a number.
        value = [str(item) if type(item) in (int, float) else item for item in value]
    return typing.cast(Value, Builder().convert(value, spec.shape, f"{where}: {spec.dotted}"))


def from_text(spec: FieldSpec, text: str | Sequence[str], where: str) -> Value:
    """Return command-line text as the field's type (``none`` clears an optional field); raises ``ConfigError``."""
    value: object = text
    if isinstance(text, str):
        if spec.shape.optional and text.lower() == "none":
            return None
        if spec.shape.base is int:
            with suppress(ValueError):
                value = int(text)
    return typing.cast(Value, Builder().convert(value, spec.shape, f"{where}: {spec.dotted}"))


def suggest_field(name: str, shown: Callable[[FieldSpec], str], siblings: Iterable[str]) -> str:
    """Return what to say of a name that is no field: the field it means elsewhere, a note, or the nearest sibling.

    Args:
        name: as the user wrote it.
        shown: how a field is written where the name stands, for example its flag.
        siblings: valid names there, to compare with ``name``.
    """
    key = name.lstrip("-").lower().replace("-", "_")
    synonym = synonyms.FIELDS.get(key)
    meant = [
        spec
        for spec in iterate_fields()
        if key in (spec.path[-1], "_".join(spec.path[-2:])) or spec.dotted == synonym  # --language-num-layers
    ]
    if meant:
        return did_you_mean(map(shown, meant))
    if note := synonyms.note(key):
        return f". {note}"
    return suggestion(name, siblings)
