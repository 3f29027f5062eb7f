"""The stored form of a packed row, and the reader of a whole prepared data set.

A row is one int32 sequence of ``<prefix>.tokens``:

    number of segments | number of images | length of each segment | id of each image | tokens

A token that is a target is stored as its bitwise complement, which is negative. So ids and supervision stay together
where a row is cut, and need no second file. Only ``join_tokens`` and ``split_tokens`` know of it. The mode byte of the
sequence holds the number of images, so that rows can be dealt evenly over ranks using only the index.
``<prefix>.images`` holds each encoded image once, as bytes. ``<prefix>.keys`` holds a JSON list for each row, with one
entry ``[source, task, key, start, stop]`` per segment: the sample of the segment, and the range of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.indexed import IndexedFile
from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.sample import PackedRow
from megatron_vl.errors import DataError

IntArray = npt.NDArray[np.int64]

MAX_IMAGES_PER_ROW = 127
_HEADER_LENGTH = 2
_USUAL_HEAD = 64
"""Entries in the first read for the segment lengths of a row. Rows with more segments need a second read."""


@dataclass(frozen=True)
class SegmentKey:
    """Origin of a segment of a row: tokens [start, stop) of a sample."""

    source: str
    task: str
    key: str
    start: int
    stop: int


def join_tokens(tokens: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return the token ids as int32[length], complemented where they are targets.

    ``tokens`` is int32[length], ``supervised`` bool[length].
    """
    return np.where(supervised, ~tokens, tokens)


def split_tokens(joined: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return the token ids int32[length] and whether they are targets, bool[length]: undo ``join_tokens``."""
    supervised = joined < 0
    return np.where(supervised, ~joined, joined), supervised


def encode_row(segments: Sequence[npt.NDArray[np.int32]], image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return the stored form of a row as int32[items].

    ``segments`` are int32[length] each, as returned by ``join_tokens``. ``image_ids`` is int64[images].
    """
    header = [len(segments), len(image_ids), *map(len, segments)]
    return np.concatenate([np.array(header, dtype=np.int32), image_ids.astype(np.int32), *segments])


def row_lengths(segments: IntArray, images: IntArray, tokens: IntArray) -> IntArray:
    """Return the number of items in each stored row; arguments and result are int64[rows]."""
    return _HEADER_LENGTH + segments + images + tokens


def decode_row(stored: npt.NDArray[np.int32], where: str) -> PackedRow:
    """Decode a row from its stored form int32[items].

    Raises:
        DataError: The entries contradict each other; ``where`` names the row in the message.
    """
    if len(stored) < _HEADER_LENGTH:
        raise DataError(f"{where}: too short for a row; the data set is damaged. Prepare it again.")
    num_segments, num_images = int(stored[0]), int(stored[1])
    first_image = _HEADER_LENGTH + num_segments
    first_token = first_image + num_images
    segment_lengths = stored[_HEADER_LENGTH:first_image]
    joined = stored[first_token:]
    if min(num_segments, num_images) < 0 or int(segment_lengths.sum()) != len(joined):
        raise DataError(
            f"{where}: {num_segments} segments of {int(segment_lengths.sum())} tokens, but the row holds "
            f"{len(joined)}; "
            "the data set is damaged. Prepare it again."
        )
    tokens, supervised = split_tokens(joined)
    return PackedRow(
        tokens=tokens,
        supervised=supervised,
        segment_lengths=segment_lengths,
        image_ids=stored[first_image:first_token].astype(np.int64),
    )


def encode_keys(keys: Sequence[SegmentKey]) -> bytes:
    """Return the stored form of the segment keys of a row."""
    entries = [[key.source, key.task, key.key, key.start, key.stop] for key in keys]
    return json.dumps(entries, separators=(",", ":")).encode("ascii")


class RowStore:
    """A prepared data set, opened for reading: rows, images and keys by index.

    Opening reads the manifest and the indices. It raises DataError if anything is missing, truncated or inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        self._tokens = IndexedFile(f"{prefix}.tokens", with_modes=True)
        self._images = IndexedFile(f"{prefix}.images")
        self._keys = IndexedFile(f"{prefix}.keys")
        if not len(self._tokens) == len(self._keys) == self.manifest.num_rows:
            raise DataError(
                f"{prefix}: {len(self._tokens)} rows and {len(self._keys)} lists of keys, the manifest says "
                f"{self.manifest.num_rows}. The files belong to different data sets; prepare the data again."
            )

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def row_lengths(self) -> npt.NDArray[np.int32]:
        """int32[rows]: length of each stored row, tokens and a few header entries. It is the cost of the row."""
        return self._tokens.lengths

    @property
    def row_images(self) -> npt.NDArray[np.int8]:
        """int8[rows]: number of images in each row."""
        assert self._tokens.modes is not None
        return self._tokens.modes

    def row(self, index: int) -> PackedRow:
        """Return one row. Raises DataError if its entries contradict each other."""
        stored = np.frombuffer(self._tokens.read_bytes(index), dtype=np.int32)
        return decode_row(stored, f"{self.prefix}, row {index}")

    def segment_lengths(self, index: int) -> npt.NDArray[np.int32]:
        """Return the number of tokens in each segment of a row as int32[segments], without reading the tokens.

        Raises:
            DataError: The entries contradict the length of the row.
        """
        length, num_images = int(self._tokens.lengths[index]), int(self.row_images[index])
        head = np.frombuffer(self._tokens.read_bytes(index, stop=min(length, _USUAL_HEAD)), dtype=np.int32)
        stop = _HEADER_LENGTH + max(int(head[0]), 0) if len(head) else length + 1
        if len(head) < stop <= length:
            head = np.frombuffer(self._tokens.read_bytes(index, stop=stop), dtype=np.int32)
        lengths = head[_HEADER_LENGTH:stop]
        if stop + num_images + int(lengths.sum(dtype=np.int64)) != length:
            raise DataError(f"{self.prefix}, row {index}: its head contradicts its length; prepare the data again.")
        return lengths

    def keys(self, index: int) -> list[SegmentKey]:
        """Return the origin of each segment of a row. Raises DataError if the entries are damaged."""
        try:
            return [SegmentKey(*entry) for entry in json.loads(self._keys.read_bytes(index))]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.prefix}, row {index}: damaged keys ({error}); prepare the data again.") from error

    def image(self, index: int) -> bytes:
        """Return one encoded image. Raises DataError if there is no such image."""
        if not 0 <= index < len(self._images):
            raise DataError(
                f"{self.prefix}: a row refers to image {index} of {len(self._images)}; prepare the data again."
            )
        return self._images.read_bytes(index)

    def close(self) -> None:
        """Close all files."""
        for file in (self._tokens, self._images, self._keys):
            file.close()
