"""The elements of a large JSON document, one at a time, starting at any element.

Question files have several gigabytes (GQA), and a document that is parsed as a whole takes several times its size in
memory. So the text is read in blocks. The decoder of the standard library decodes one element at a time from the window
of text. Everything beside the elements is skipped in the same way. ``array_shards`` reads the document once and records
the byte at which each shard begins. It raises an error, with the position, for a file that is truncated or invalid
anywhere, before any element is used. ``read_array`` then starts at the first byte of a shard.

Memory is bounded by the longest element. Bytes that are not UTF-8 become lone surrogates, so they affect only their own
record (``clean_text``).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vl.data.file_kinds import HEAD_BYTES, what_is
from megatron_vl.data.formats.shard import Shard
from megatron_vl.data.formats.zips import DAMAGED, open_file
from megatron_vl.errors import DataError

CHUNK_BYTES = 2**18
MAX_ELEMENT_CHARACTERS = 64 * 2**20
_BLANKS = re.compile("[ \\t\\n\\r\ufeff]*")
"""White space, and the byte-order mark that some editors write at the beginning."""


@dataclass(frozen=True)
class Element:
    """One element of a list, or one entry of a dictionary."""

    index: int
    """Index, counted from 0."""
    value: Any
    key: str = ""
    """Key in a dictionary; empty in a list."""


def array_shards(path: Path, elements_per_shard: int, key: str | None = None) -> list[Shard]:
    """Return shards of the list or dictionary at the top of a document, or under ``key`` of the object at the top.

    ``path`` may lead into a zip.

    Raises:
        DataError: The file is missing, invalid or has another structure.
    """
    if elements_per_shard < 1:
        raise DataError(f"records_per_shard is {elements_per_shard}, expected at least 1")
    begins: list[int] = []
    total = 0
    with open_file(path) as stream:
        document = _Document(path, stream)
        document.enter(key)
        while document.more():
            if total % elements_per_shard == 0:
                begins.append(document.offset)
            document.element()
            total += 1
        document.leave(key)
    firsts = range(0, total, elements_per_shard)
    return [
        Shard(f"{path.name}:{first}", path, first, min(elements_per_shard, total - first), offset)
        for first, offset in zip(firsts, begins, strict=True)
    ]


def read_array(shard: Shard) -> Iterator[Element]:
    """Yield the elements of a shard. Raises DataError if the file has changed since the shards were made."""
    with open_file(shard.path) as stream:
        stream.seek(shard.offset)
        document = _Document(shard.path, stream, shard.offset)
        for index in range(shard.first, shard.first + (shard.count or 0)):
            if not document.more():
                raise DataError(f"{shard.path}: has {index} elements; it was changed while it was read")
            key, value = document.element()
            yield Element(index, value, key)


def iter_array(path: Path, key: str | None = None) -> Iterator[Element]:
    """Yield all elements of the list or dictionary at the top, or under ``key`` of the object at the top.

    Raises:
        DataError: The document has an error.
    """
    with open_file(path) as stream:
        document = _Document(path, stream)
        document.enter(key)
        index = 0
        while document.more():
            name, value = document.element()
            yield Element(index, value, name)
            index += 1
        document.leave(key)


class _Document:
    """A window of decoded text that moves over a file."""

    def __init__(self, path: Path, stream: IO[bytes], offset: int = 0) -> None:
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._position = 0
        self._start = offset  # first byte of the window
        self._head = b""
        self._ended = False
        self._brackets = "]}"  # brackets that may close the current list or dictionary
        self._first = True  # no element was read yet

    @property
    def offset(self) -> int:
        """Byte at which the next value begins."""
        self._peek()
        return self._start + _num_bytes(self._text[: self._position])

    def enter(self, wanted: str | None) -> None:
        """Move to the first element of the list or dictionary at the top, or under the key ``wanted``."""
        if wanted is None:
            self._open("[{", "a list or an object at the top")
            return
        self._open("{", f"an object with {wanted!r} at the top")
        found = []
        while self.more():
            found.append(self._key())
            if found[-1] == wanted:
                self._open("[{", f"a list under {wanted!r}")
                return
            self._pass_over()
        raise DataError(f"{self._path}: expected a list under {wanted!r}; found the keys {found[:8]}")

    def leave(self, wanted: str | None) -> None:
        """Check the rest of the document after the list that was entered with the same argument."""
        if wanted is not None:
            self._brackets = "}"
            while self.more():
                self._key()
                self._pass_over()
        if self._peek():
            hint = "" if wanted is None else f". An object a line has no {wanted!r}: say where the records are"
            raise self._error(f"expected the end of the file, found another value{hint}", self._position)

    def more(self) -> bool:
        """Return whether another element follows; consume the comma before it or the closing bracket."""
        closed = self._take(self._brackets, needed=False)
        if not closed and not self._first:
            self._take(",")
        self._first = False
        return not closed

    def element(self) -> tuple[str, Any]:
        """Return the next element, with its key in a dictionary."""
        if self._brackets == "}":
            return self._key(), self._value()
        value = self._value()
        if self._brackets == "]}" and self._take(":", needed=False):  # the first element shows the kind of container
            self._brackets = "}"
            return str(value), self._value()
        self._brackets = "]"
        return "", value

    def _key(self) -> str:
        if self._peek() != '"':
            raise self._error("expected a key", self._position)
        key = str(self._value())
        self._take(":")
        return key

    def _pass_over(self) -> None:
        """Skip a value, element by element if it is a list or dictionary."""
        outside = self._brackets
        if self._peek() not in ("[", "{"):
            self._value()
            return
        self._open("[{", "a value")
        while self.more():
            self.element()
        self._brackets = outside

    def _open(self, brackets: str, expected: str) -> None:
        bracket = self._peek()
        if not self._take(brackets, needed=False):
            self._refuse_foreign()
            raise DataError(f"{self._path}: found {self._text[self._position :][:20]!r}, expected {expected}")
        self._brackets = "]" if bracket == "[" else "}"
        self._first = True

    def _take(self, characters: str, *, needed: bool = True) -> bool:
        """Consume one of ``characters`` if it is next; return whether it was."""
        following = self._peek()
        if following and following in characters:
            self._position += 1
            return True
        if needed:
            raise self._error(f"expected {characters!r}", self._position)
        return False

    def _value(self) -> Any:
        """Return the value at the position."""
        self._peek()
        while True:
            try:
                value, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                message, position = error.msg, error.pos
            except (ValueError, RecursionError) as error:  # thousands of digits in a number, or deep nesting
                raise self._error(str(error), self._position) from error
            else:
                if end + 2 < len(self._text) or self._ended:  # a number may continue in the next block: 1 of 1e-5
                    self._position = end
                    return value
                message, position = "no end", end
            if self._ended or len(self._text) - self._position > MAX_ELEMENT_CHARACTERS:
                raise self._error(message, position)
            self._read_on()

    def _peek(self) -> str:
        """Return the next character that is not white space; empty at the end of the file."""
        while True:
            self._position = _BLANKS.match(self._text, self._position).end()  # type: ignore[union-attr]  # it may be ""
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_on()

    def _read_on(self) -> None:
        """Drop the used text and double the rest by reading on, so that a long element needs few attempts."""
        self._start += _num_bytes(self._text[: self._position])
        rest = self._text[self._position :]
        try:
            data = self._stream.read(max(CHUNK_BYTES, len(rest)))
        except DAMAGED as error:
            raise DataError(f"{self._path}: cannot be read ({error}); is the file complete?") from error
        self._head = self._head or data[:HEAD_BYTES]
        self._ended = not data
        self._text, self._position = rest + self._decoder.decode(data, final=self._ended), 0

    def _refuse_foreign(self) -> None:
        if foreign := what_is(self._head):
            raise DataError(f"{self._path}: it is {foreign}; expected JSON in UTF-8")

    def _error(self, message: str, position: int) -> DataError:
        self._refuse_foreign()
        byte = self._start + _num_bytes(self._text[:position])
        return DataError(f"{self._path}: not valid JSON ({message} at byte {byte}); is the file complete?")


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
