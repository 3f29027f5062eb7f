"""Open the data set of a prefix and its vocabulary, or raise an error that proposes other prefixes."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_vl.config.data_files import unfinished_data_set
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.dataset.manifest import Manifest, manifest_path
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.prompting.tokenizer import QWEN_SHA256, find_vocab_file, read_ranks
from megatron_vl.errors import DataError

_MAX_NAMED = 12


@dataclass(frozen=True)
class Vocabulary:
    """Maps ids to bytes and names. Reading needs nothing more, so no encoder is built."""

    ranks: tuple[bytes, ...]
    special: SpecialTokens

    @cached_property
    def special_text(self) -> dict[int, str]:
        """The text of each special token, by id."""
        return {token_id: text for text, token_id in self.special.by_text.items()}

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids of text."""
        return b"".join(self.ranks[token_id] for token_id in ids)


def open_store(prefix: str) -> RowStore:
    """Open a data set. Raises DataError if it is damaged, or for a wrong prefix, and then lists nearby prefixes."""
    if not manifest_path(prefix).is_file():
        raise DataError(unfinished_data_set(prefix) or _no_data_set(prefix))
    return RowStore(prefix)


def open_vocabulary(prefix: str, manifest: Manifest, vocab_file: Path | None = None) -> Vocabulary:
    """Return the vocabulary with which a data set was made, by default Qwen's.

    Raises:
        DataError: if the data set needs another one and none is given, or if the file is not the one it needs.
    """
    if vocab_file is None and manifest.tokenizer_sha256 != QWEN_SHA256:
        raise DataError(
            f"{prefix}: made with another vocabulary than Qwen's (SHA-256 {manifest.tokenizer_sha256}); give its "
            ".tiktoken file as --vocab-file."
        )
    path = vocab_file or find_vocab_file()
    ranks = tuple(read_ranks(path, manifest.tokenizer_sha256))
    if manifest.num_bpe_tokens > len(ranks):
        raise DataError(
            f"{prefix}: keeps {manifest.num_bpe_tokens} byte-pair tokens, but {path} has {len(ranks)}; prepare the "
            "data again."
        )
    return Vocabulary(ranks[: manifest.num_bpe_tokens], SpecialTokens(manifest.num_bpe_tokens))


def _no_data_set(prefix: str) -> str:
    path = Path(prefix)
    folder = path if path.is_dir() else path.parent
    found = _prefixes_in(folder)
    named = ", ".join(found[:_MAX_NAMED]) + (f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else "")
    nearest = next((name for name in found if prefix.startswith(f"{name}.")), None)
    if nearest is not None:
        return f"{prefix}: is a file of the data set {nearest}; give that, without an ending."
    if not folder.is_dir():
        return f"{prefix}: no such data set, and no folder {folder}. Make one with tools/prepare_data.py."
    if found:
        return f"{prefix}: no such data set; in {folder} there {'is' if len(found) == 1 else 'are'} {named}."
    return f"{prefix}: no such data set, and none in {folder}. Make one with tools/prepare_data.py."


def _prefixes_in(folder: Path) -> list[str]:
    """Return the prefixes of a folder's finished data sets: those with a manifest and an index of rows."""
    manifests = sorted(folder.glob("*.json")) if folder.is_dir() else []
    names = [str(path.with_suffix("")) for path in manifests]
    return [name for name in names if any(Path(f"{block}.tokens.idx").is_file() for block in _possible_blocks(name))]


def _possible_blocks(prefix: str) -> list[str]:
    """Return the prefixes that the blocks of a data set may have."""
    path = Path(prefix)
    found = path.parent.glob(f"{glob.escape(path.name)}.?????-of-?????.tokens.idx")
    return [prefix, *(str(index).removesuffix(".tokens.idx") for index in found)]
