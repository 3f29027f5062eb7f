"""Qwen's tokenizer: byte-level BPE over NFC text with the first ``num_bpe_tokens`` merges, then special tokens.

The merges are Qwen's own file (151,643 lines of base64 bytes and rank). It is found inside the installed ``dashscope``
package, without importing that package, or given by path. Its SHA-256 is checked, because a model trained with a
vocabulary that differs in one line is useless to others. The first 256 ranks are the single bytes. So any prefix of the
file of at least that length is a complete vocabulary: a small model keeps 2,048 ranks and can still encode every text.

Invariant: text from data never becomes a special token. ``encode`` produces no special token at all.
``encode_with_specials`` parses only those that its caller allows.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import importlib.util
import unicodedata
from array import array
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import tiktoken

from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.errors import ConfigError, DataError

QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
"""SHA-256 of ``qwen.tiktoken`` with LF line ends. (A copy with CRLF exists and is accepted.)"""
NUM_BYTES = 256
_LONG_TEXT = 150
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"  # digits one by one
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class QwenTokenizer:
    """Converter between text and ids; see the module docstring for the source of the vocabulary."""

    def __init__(self, num_bpe_tokens: int, vocab_file: str | Path | None = None) -> None:
        """Read and check the vocabulary.

        Raises:
            ConfigError: ``num_bpe_tokens`` is impossible.
            DataError: The file is missing or is not Qwen's.
        """
        ranks = read_ranks(find_vocab_file() if vocab_file is None else Path(vocab_file))
        if not NUM_BYTES <= num_bpe_tokens <= len(ranks):
            raise ConfigError(
                f"model.num_bpe_tokens = {num_bpe_tokens}: expected {NUM_BYTES} (the single bytes) to {len(ranks)} "
                "(all ranks)."
            )
        self.special = SpecialTokens(num_bpe_tokens)
        self.special_ids = self.special.by_text
        """Surface form of each special token -> its id."""
        self._encoding = tiktoken.Encoding(
            name=f"qwen_{num_bpe_tokens}",
            pat_str=_PATTERN,
            mergeable_ranks=dict(list(ranks.items())[:num_bpe_tokens]),
            special_tokens=self.special_ids,
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text. The surface form of a special token is encoded like any other text."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def append(self, ids: array[int], text: str) -> None:
        """Append the ids of ``encode`` to an array of type "i" in the fastest way.

        An intermediate list would take a quarter of the time for a long text, and numpy half of the time for a short
        one.
        """
        if len(text) > _LONG_TEXT:
            normal = unicodedata.normalize("NFC", text)
            with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate, which encode replaces
                found = self._encoding.encode_to_numpy(normal, allowed_special=set(), disallowed_special=())
                ids.frombytes(found.tobytes())
                return
        ids.extend(self.encode(text))

    def encode_with_specials(self, text: str, allowed: Collection[str] | None = None) -> list[int]:
        """Return the ids of text, parsing the special tokens ``allowed`` (surface forms, by default all).

        Use this for own text and for tests, never for text from data.
        """
        specials = self.special_ids if allowed is None else allowed
        return self._encoding.encode(
            unicodedata.normalize("NFC", text), allowed_special=set(specials), disallowed_special=()
        )

    def decode(self, ids: Iterable[int], *, keep_special: bool | Collection[str] = True) -> str:
        """Return the text of ids. Special tokens are kept, dropped, or kept if they are in ``keep_special``.

        Ids of the embedding's padding (beyond the vocabulary) have no text and are dropped. Bytes that are not UTF-8
        become U+FFFD, for example when a generation stops within a character.
        """
        kept = [i for i in ids if i < self.special.num_bpe_tokens or self._keeps(i, keep_special)]
        return self._encoding.decode_bytes(kept).decode("utf-8", errors="replace")

    def _keeps(self, token_id: int, keep_special: bool | Collection[str]) -> bool:
        text = self._special_text.get(token_id)
        if text is None or isinstance(keep_special, bool):
            return text is not None and bool(keep_special)
        return text in keep_special

    @cached_property
    def _special_text(self) -> dict[int, str]:
        return {token_id: text for text, token_id in self.special_ids.items()}


def find_vocab_file() -> Path:
    """Return the path of ``qwen.tiktoken`` inside the installed ``dashscope`` package, without importing the package.

    Raises:
        DataError: The package is not installed or does not hold the file.
    """
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise DataError(
        "Qwen's vocabulary was not found: package 'dashscope' with resources/qwen.tiktoken is not installed. "
        "Install it (pip install --no-deps dashscope) or give the file: vocab_file in a data recipe, --vocab-file "
        "where a tool has it."
    )


def read_ranks(path: Path, sha256: str = QWEN_SHA256) -> dict[bytes, int]:
    """Return the merges of a ``.tiktoken`` file, bytes to rank, in order of rank.

    Raises:
        DataError: The file cannot be read, does not have this ``sha256`` (by default Qwen's), or its ranks have gaps.
    """
    try:
        content = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise DataError(f"vocabulary {path}: cannot be read ({error.strerror}).") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        known = " (qwen.tiktoken of Qwen-VL)" if sha256 == QWEN_SHA256 else ""
        raise DataError(
            f"vocabulary {path}: SHA-256 is {found}, expected {sha256}{known}. "
            "The file is damaged or of another model; fetch it again."
        )
    return parse_ranks(content, str(path))


def parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Parse lines 'base64 rank', and check that ranks run 0, 1, 2, ... and begin with all single bytes.

    ``name`` names the file in messages.

    Raises:
        DataError: A line is wrong; the message names the first such line.
    """
    ranks: dict[bytes, int] = {}
    for line_index, line in enumerate(content.splitlines()):
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"vocabulary {name}, line {line_index + 1}: expected 'base64 rank'.") from error
        if rank != line_index or token in ranks:
            raise DataError(f"vocabulary {name}, line {line_index + 1}: rank {rank}, expected {line_index}, each once.")
        ranks[token] = rank
    if set(list(ranks)[:NUM_BYTES]) != {bytes([value]) for value in range(NUM_BYTES)}:
        raise DataError(f"vocabulary {name}: the first {NUM_BYTES} ranks are not the single bytes.")
    return ranks
