"""Strict access to the values of a record: each function returns what it promises or raises ``SkipSample``."""

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
"""Pattern of a number as a text has it."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say nothing; a number 0 says something."""


def field(record: Json, name: str, kind: type | tuple[type, ...]) -> Any:
    """``record[name]``, checked to be a ``kind``; otherwise SkipSample('missing_field' or 'wrong_field')."""
    if not isinstance(record, Mapping):
        raise SkipSample("wrong_field", f"expected an object, found {type(record).__name__}")
    if name not in record:
        raise SkipSample("missing_field", f"no {name!r}; found {sorted(record)[:8]}")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SkipSample("wrong_field", f"{name!r} is {type(value).__name__}")
    return value


def language_of(record: Json, default: Literal["en", "zh"]) -> Literal["en", "zh"]:
    """The language that a record names under ``lang`` (``zh``, ``zh-CN``, ``en_US``); ``default`` if it is neither."""
    named = record.get("lang")
    start = re.split("[-_]", named.strip().lower())[0] if isinstance(named, str) else ""
    return "zh" if start == "zh" else "en" if start == "en" else default


def is_finite(value: Any) -> bool:
    """Whether a value of a record is a number with which to reckon: no bool, no NaN, not beyond what a float can be (an
    integer of JSON can)."""
    return type(value) in (float, int) and -_LARGEST < value < _LARGEST


def size_of(width: Any, height: Any, what: str) -> tuple[int, int]:
    """Width and height in pixels that a record declares, ``640.0`` among them; raises SkipSample('bad_size')."""
    sides = [int(side) for side in (width, height) if is_finite(side) and side > 0 and side == int(side)]
    if len(sides) != 2:
        raise SkipSample("bad_size", f"{what} are {width!r:.40} and {height!r:.40}, expected pixels")
    return sides[0], sides[1]


def words_of(value: Any, what: str) -> str:
    """What is to be learned of a value: a text, or a finite number as decimals; SkipSample('wrong_field') otherwise.

    Whether ``true`` is to be learned as "true" or as "yes" is not for us to say.
    """
    if isinstance(value, str):
        return value
    if not is_finite(value):
        raise SkipSample("wrong_field", f"{what} is {value!r:.40}, expected a text or a number")
    return format(Decimal(repr(value)), "f")


def words_in(record: Json, name: str) -> str:
    """``record[name]`` as ``words_of`` gives it; raises SkipSample as ``field`` does."""
    return words_of(field(record, name, object), repr(name))


def as_number(value: Any) -> float | None:
    """A finite number in whatever form a record has it: also as text (``"0.31"``), and as parquet's decimal."""
    if isinstance(value, (str, Decimal)):
        text = str(value).strip()
        value = float(text) if re.fullmatch(NUMBER, text) else None
    return float(value) if is_finite(value) else None


def decode_text(data: bytes, what: str) -> str:
    """The text in some bytes, without the byte-order mark; SkipSample('bad_unicode') if it is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        said = what_is(data)
        raise SkipSample("bad_unicode", f"{what}: {said or f'{error.reason} at byte {error.start}'}") from error


def clean_text(text: str, what: str) -> str:
    """``text`` without surrounding blanks and byte-order marks; SkipSample if it is empty or has lone surrogates."""
    text = text.replace(BYTE_ORDER_MARK, "").strip()
    if not text:
        raise SkipSample("empty_text", f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkipSample("bad_unicode", f"{what}: {error.reason}") from error
    return text
