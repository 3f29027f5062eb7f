"""Pickles that hold plain data, read without being able to run anything.

A pickle is a program for a small machine; what makes it dangerous is that it may call any function that it
names. This reader knows no names: a pickle that asks for one is refused, and what is left is lists, tuples,
dictionaries, strings and numbers, which is all that the published files are made of. They were written by
Python 2, whose strings are bytes: they are taken as UTF-8, one that is not as Latin-1.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from megatron_vl.data.formats.zips import open_file
from megatron_vl.errors import DataError

BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError)
"""What damaged pickles raise beside UnpicklingError."""


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every name."""

    def find_class(self, module: str, name: str, /) -> NoReturn:
        raise _NameRefused(f"{module}.{name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise _NameRefused(f"the persistent object {pid!r:.60}")


class _NameRefused(Exception):
    """The pickle asks for a function or a class."""


def load_plain_pickle(path: Path) -> Any:
    """What the pickle holds, if that is plain data; raises DataError otherwise, before anything is called."""
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
    """A string of such a pickle, with bytes that are no UTF-8 taken as Latin-1."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("latin-1")
        except UnicodeEncodeError:  # a lone surrogate that was in the data
            return text
    return text
