"""Frozen dataclasses from what YAML or JSON has parsed: the only reader of such mappings, for any file.

The annotations of the fields are the rules: ``bool``, ``int``, ``float``, ``str``, ``Path``, ``Literal``, tuples of
one type, mappings from names, other dataclasses, any of these ``| None``, and ``Annotated`` numbers with
:class:`Between`. Nothing is guessed. But an integer is a number too, and so is a text such as ``1e-4``, which YAML 1.1
does not take for a number. A value that is a record already is kept.

An error says where, what was found, what was expected, and which name was likely meant. This is why msgspec and cattrs
are not used here. msgspec ignores unknown keys of a dataclass. cattrs makes the string '5' of a 5. Neither names the
nearest name, and most of their errors do not name the value.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from megatron_vl.config.suggestions import suggestion, suggestion_or_list
from megatron_vl.errors import ConfigError, MegatronVLError

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path", dict: "a mapping"
}  # fmt: skip


@dataclass(frozen=True)
class Between:
    """Bounds of a number, in its annotation."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    @property
    def words(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f" from {self.least} to {self.most}"
        named = {"of at least": self.least, "above": self.above, "and at most": self.most}
        return "".join(f" {name} {value}" for name, value in named.items() if math.isfinite(value))


@dataclass(frozen=True)
class Shape:
    """An annotation, taken apart."""

    base: Any
    """A type without parameters: bool, int, float, str, Path, tuple, dict or a dataclass; str for a Literal."""
    choices: tuple[str, ...] = ()
    """Permitted strings; empty if any value of the type will do."""
    element: Any = None
    """What a tuple has, or the values of a mapping."""
    optional: bool = False
    """Whether ``None`` is a value."""
    bounds: Between = Between()

    @classmethod
    def of(cls, hint: Any) -> Shape:
        """Take an annotation apart."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (member,) = (member for member in arguments if member is not types.NoneType)
            return dataclasses.replace(cls.of(member), optional=True)
        if origin is Annotated:
            return dataclasses.replace(cls.of(arguments[0]), bounds=arguments[1])
        if origin is Literal:
            return cls(str, choices=arguments)
        if origin is tuple:
            return cls(tuple, element=arguments[0])
        if origin in (dict, Mapping):
            return cls(dict, element=arguments[1])
        assert hint in _WORDS or dataclasses.is_dataclass(hint), f"a field has the unsupported type {hint}"
        return cls(hint)

    @property
    def expected(self) -> str:
        """The annotation in words, for messages and help."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.base is tuple:
            text = "a list" + {str: " of strings", int: " of integers"}.get(self.element, "")
        else:
            text = _WORDS.get(self.base, "a mapping") + self.bounds.words
        return f"{text}, or none" if self.optional else text


@dataclass(frozen=True)
class Builder:
    """How records of one kind of file are built."""

    error: type[MegatronVLError] = ConfigError
    root: Path | None = None
    """The folder from which relative paths count."""
    locate: Callable[[Path | None, str | Path], Path] | None = None
    """What makes a path of ``root`` and a value; raises ValueError. By default it is a path on the disk."""
    purpose: str = ""
    """Said of keys that are unknown or missing, for example `` for source type vqa``."""
    ours: bool = False
    """A program wrote the file, maybe a newer version: unknown keys are ignored, and numbers may be infinite."""

    def build(self, kind: type[T], values: object, where: str, *, base: T | None = None) -> T:
        """Return a record of ``values``, over those of ``base`` if given; ``where`` begins every message."""
        if isinstance(values, kind):
            return values
        if not isinstance(values, Mapping):
            raise self.error(f"{where}: found {describe_value(values)}, expected a mapping")
        fields = _fields_of(typing.cast(Any, kind))
        built = {}
        for key, value in values.items():
            if key in fields:
                built[key] = self.convert(value, fields[key][0], below(where, key))
            elif not self.ours:
                raise self.error(f"{where}: unknown key {key!r}{self.purpose}{suggestion_or_list(key, fields)}")
        if base is not None:
            return dataclasses.replace(base, **built)  # type: ignore[type-var]
        missing = [name for name, (_, required) in fields.items() if required and name not in built]
        if missing:
            text = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            raise self.error(f"{where}: {text}{self.purpose}; found the keys {', '.join(map(str, values))}")
        try:
            return kind(**built)
        except ValueError as error:  # what the record itself refuses
            raise self.error(f"{where}: {error}") from error

    def convert(self, value: Any, hint: Any, where: str) -> Any:
        """Return a value as the annotation ``hint`` wants it."""
        shape = hint if isinstance(hint, Shape) else Shape.of(hint)
        if value is None and shape.optional:
            return None
        if dataclasses.is_dataclass(shape.base):
            return self.build(typing.cast(type[Any], shape.base), value, where)
        if shape.base is tuple and isinstance(value, list | tuple):
            return tuple(self.convert(item, shape.element, f"{where}[{i}]") for i, item in enumerate(value))
        if shape.base is dict and isinstance(value, Mapping):
            return {str(key): self.convert(item, shape.element, below(where, key)) for key, item in value.items()}
        try:
            found = self._scalar(value, shape)
        except ValueError as error:  # what ``locate`` refuses
            raise self.error(f"{where}: {error}") from error
        if found is None:
            raise self.error(_wrong_type(value, shape, where))
        return found

    def _scalar(self, value: Any, shape: Shape) -> Any:
        """Return a bool, number, text or path, or None if ``value`` is none of the kind."""
        if isinstance(value, bool) or shape.base is bool:
            return value if shape.base is bool and isinstance(value, bool) else None
        if shape.base is Path:
            return self._path(value) if isinstance(value, str | Path) and str(value) else None
        if shape.base is str:
            return value if isinstance(value, str) and (not shape.choices or value in shape.choices) else None
        number = _float_of(value) if shape.base is float else value if isinstance(value, int) else None
        bounds = shape.bounds
        if number is None or not (math.isfinite(number) or self.ours):
            return None
        return number if bounds.least <= number <= bounds.most and number > bounds.above else None

    def _path(self, value: str | Path) -> Path:
        return self.locate(self.root, value) if self.locate else (self.root or Path()) / value


def below(where: str, key: object) -> str:
    """Return the place of a key: ``file: key`` at the top of a file, ``file: key.key`` in it."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def describe_value(value: object) -> str:
    """Name a value and its type in YAML's words."""
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    kinds: tuple[tuple[type, str], ...] = (
        (str, "a string"), (int, "an integer"), (float, "a number"), (list, "a list"), (Mapping, "a mapping")
    )  # fmt: skip
    for kind, words in kinds:
        if isinstance(value, kind):
            return f"{value!r:.60} ({words})"
    return "empty" if value is None else f"{value!r:.60}"


def _wrong_type(value: object, shape: Shape, where: str) -> str:
    message = f"{where}: found {describe_value(value)}, expected {shape.expected}"
    if isinstance(value, str):
        message += suggestion(value, shape.choices)
    if shape.base is str and isinstance(value, bool | int | float):
        message += ". Put the value in quotes if it is meant as text"
    if shape.base is tuple and isinstance(value, str):
        message += f", for example [{value}]"
    return message


def _float_of(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


@cache
def _fields_of(kind: Any) -> Mapping[str, tuple[Shape, bool]]:
    """Return the fields of a dataclass, and whether each has to be given."""
    hints = typing.get_type_hints(kind, include_extras=True)
    nothing = dataclasses.MISSING
    return {
        item.name: (Shape.of(hints[item.name]), item.default is nothing and item.default_factory is nothing)
        for item in dataclasses.fields(kind)
    }
