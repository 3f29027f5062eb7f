"""Reader of pickles that hold plain data. It cannot run any code.

A pickle is a program for a small virtual machine. It is dangerous because it may call any function that it names. This
reader supports no names and refuses a pickle that uses one. What remains are lists, tuples, dictionaries, strings and
numbers. The published files contain nothing else. They were written by Python 2, whose strings are bytes. A string is
decoded as UTF-8, or as Latin-1 if it is not UTF-8.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from megatron_vl.data.formats.zips import open_file
from megatron_vl.errors import DataError

BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError)
"""Exceptions that damaged pickles raise besides UnpicklingError."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that refuses every name."""

    def find_class(self, module: str, name: str, /) -> NoReturn:
        raise _NameRefused(f"{module}.{name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise _NameRefused(f"the persistent object {pid!r:.60}")


class _NameRefused(Exception):
    """The pickle requests a function or a class."""


def load_plain_pickle(path: Path) -> Any:
    """Return the content of a pickle of plain data. Raises DataError for any other, before anything is called."""
    with open_file(path) as stream:
        try:
            value = _PlainUnpickler(stream, encoding="utf-8", errors="surrogateescape").load()
        except _NameRefused as error:
            raise DataError(
                f"{path}: the pickle asks for {error}; expected lists, dictionaries, strings and numbers only. It "
                "is not the published file, and loading it could run any code: do not use it"
            ) from None
        except (pickle.UnpicklingError, *BROKEN) as error:
            raise DataError(
                f"{path}: not a whole pickle ({type(error).__name__}: {error}); download it again"
            ) from error
    return value


def plain_text(text: str) -> str:
    """Return a string of such a pickle; bytes that are not UTF-8 are decoded as Latin-1."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("latin-1")
        except UnicodeEncodeError:  # a lone surrogate that was in the data
            return text
    return text
