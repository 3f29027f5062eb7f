"""Strict access to the values of a record. Each function returns a valid value or raises ``SkipSample``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from megatron_vl.data.file_kinds import BYTE_ORDER_MARK, what_is
from megatron_vl.errors import SkipSample

Json = Mapping[str, Any]

_LARGEST = 1e300
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
"""Pattern of a number in text."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that are treated as absent. The number 0 is a value."""


def field(record: Json, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return ``record[name]``, checked to be a ``kind``. Raises SkipSample('missing_field' or 'wrong_field')."""
    if not isinstance(record, Mapping):
        raise SkipSample("wrong_field", f"expected an object, found {type(record).__name__}")
    if name not in record:
        raise SkipSample("missing_field", f"no {name!r}; found {sorted(record)[:8]}")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SkipSample("wrong_field", f"{name!r} is {type(value).__name__}")
    return value


def language_of(record: Json, default: Literal["en", "zh"]) -> Literal["en", "zh"]:
    """Return the language under ``lang`` (``zh``, ``zh-CN``, ``en_US``), or ``default`` if it is neither."""
    named = record.get("lang")
    start = re.split("[-_]", named.strip().lower())[0] if isinstance(named, str) else ""
    return "zh" if start == "zh" else "en" if start == "en" else default


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number: not a bool, not NaN, and not an integer beyond the range of a float.

    JSON permits such integers.
    """
    return type(value) in (float, int) and -_LARGEST < value < _LARGEST


def size_of(width: Any, height: Any, what: str) -> tuple[int, int]:
    """Return the declared width and height in pixels; ``640.0`` is accepted. Raises SkipSample('bad_size')."""
    sides = [int(side) for side in (width, height) if is_finite(side) and side > 0 and side == int(side)]
    if len(sides) != 2:
        raise SkipSample("bad_size", f"{what} are {width!r:.40} and {height!r:.40}, expected pixels")
    return sides[0], sides[1]


def words_of(value: Any, what: str) -> str:
    """Return the text to learn from a value: a text, or a finite number in decimals.

    Raises:
        SkipSample: ``wrong_field`` for any other value. A ``true`` is refused, because it is unknown whether it should
            be learned as "true" or as "yes".
    """
    if isinstance(value, str):
        return value
    if not is_finite(value):
        raise SkipSample("wrong_field", f"{what} is {value!r:.40}, expected a text or a number")
    return format(Decimal(repr(value)), "f")


def words_in(record: Json, name: str) -> str:
    """Return the text to learn from ``record[name]``. Raises SkipSample as ``field`` and ``words_of`` do."""
    return words_of(field(record, name, object), repr(name))


def as_number(value: Any) -> float | None:
    """Return a finite number in any form, also as text (``"0.31"``) or as a parquet decimal; None if it is not one."""
    if isinstance(value, (str, Decimal)):
        text = str(value).strip()
        value = float(text) if re.fullmatch(NUMBER, text) else None
    return float(value) if is_finite(value) else None


def decode_text(data: bytes, what: str) -> str:
    """Return some bytes as text, without the byte-order mark. Raises SkipSample('bad_unicode') if not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        said = what_is(data)
        raise SkipSample("bad_unicode", f"{what}: {said or f'{error.reason} at byte {error.start}'}") from error


def clean_text(text: str, what: str) -> str:
    """Return ``text`` without surrounding white space and byte-order marks.

    Raises:
        SkipSample: The text is empty or has lone surrogates.
    """
    text = text.replace(BYTE_ORDER_MARK, "").strip()
    if not text:
        raise SkipSample("empty_text", f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkipSample("bad_unicode", f"{what}: {error.reason}") from error
    return text
