"""The stored form of a packed row, and the reader of a whole prepared data set.

A row is one int32 sequence of ``<prefix>.tokens``:

    number of segments | number of images | length of each segment | id of each image | tokens

A token that is a target is stored as its bitwise complement, which is negative. So ids and supervision stay together
where a row is cut, and need no second file. Only ``join_tokens`` and ``split_tokens`` know of it. The mode byte of the
sequence holds the number of images, so that rows can be dealt evenly over ranks using only the index.
``<prefix>.images`` holds each encoded image once, as bytes. ``<prefix>.keys`` holds a JSON list for each row, with one
entry ``[source, task, key, start, stop]`` per segment: the sample of the segment, and the range of its tokens.

A large data set has such files for each of several blocks (manifest.py). The ids in a row count the images of its
block. Whoever reads a row gets ids that count those of the whole data set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.indexed import IndexedFile
from megatron_vl.data.dataset.manifest import BlockEntry, read_manifest
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


def decode_row(stored: npt.NDArray[np.int32], where: str, *, first_image: int = 0) -> PackedRow:
    """Decode a row from its stored form int32[items]. ``first_image`` is the number of the first image of its block.

    Raises:
        DataError: The entries contradict each other; ``where`` names the row in the message.
    """
    if len(stored) < _HEADER_LENGTH:
        raise DataError(f"{where}: too short for a row; the data set is damaged. Prepare it again.")
    num_segments, num_images = int(stored[0]), int(stored[1])
    image_begin = _HEADER_LENGTH + num_segments
    first_token = image_begin + num_images
    segment_lengths = stored[_HEADER_LENGTH:image_begin]
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
        image_ids=first_image + stored[image_begin:first_token].astype(np.int64),
    )


def encode_keys(keys: Sequence[SegmentKey]) -> bytes:
    """Return the stored form of the segment keys of a row."""
    entries = [[key.source, key.task, key.key, key.start, key.stop] for key in keys]
    return json.dumps(entries, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class _Files:
    """The files of one block."""

    tokens: IndexedFile
    images: IndexedFile
    keys: IndexedFile

    @classmethod
    def open(cls, prefix: str) -> _Files:
        return cls(
            IndexedFile(f"{prefix}.tokens", with_modes=True),
            IndexedFile(f"{prefix}.images"),
            IndexedFile(f"{prefix}.keys"),
        )


class RowStore:
    """A prepared data set, opened for reading: rows, images and keys by index.

    Rows and images are numbered through all blocks. Opening reads the manifest and the indices. It raises DataError if
    anything is missing, truncated or inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        self.block_prefixes = tuple(self.manifest.block_prefixes(prefix))
        """Path prefix of the files of each block."""
        self._blocks = [_Files.open(block) for block in self.block_prefixes]
        blocks = self.manifest.blocks or (BlockEntry(self.manifest.num_rows, self.manifest.num_stored_images),)
        for block_prefix, files, entry in zip(self.block_prefixes, self._blocks, blocks, strict=True):
            if not len(files.tokens) == len(files.keys) == entry.num_rows:
                raise DataError(
                    f"{block_prefix}: {len(files.tokens)} rows and {len(files.keys)} lists of keys, the manifest says "
                    f"{entry.num_rows}. The files belong to different data sets; prepare the data again."
                )
        self._first_rows = np.cumsum([0, *(len(files.tokens) for files in self._blocks)])
        self._first_images = np.cumsum([0, *(len(files.images) for files in self._blocks)])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def row_lengths(self) -> npt.NDArray[np.int32]:
        """int32[rows]: length of each stored row, tokens and a few header entries. It is the cost of the row."""
        lengths = [files.tokens.lengths for files in self._blocks]
        return lengths[0] if len(lengths) == 1 else np.concatenate(lengths)

    @property
    def row_images(self) -> npt.NDArray[np.int8]:
        """int8[rows]: number of images in each row."""
        counts = [_modes(files.tokens) for files in self._blocks]
        return counts[0] if len(counts) == 1 else np.concatenate(counts)

    def row(self, index: int) -> PackedRow:
        """Return one row. Raises DataError if its entries contradict each other."""
        block, place = self._locate_row(index)
        stored = np.frombuffer(self._blocks[block].tokens.read_bytes(place), dtype=np.int32)
        return decode_row(stored, f"{self.prefix}, row {index}", first_image=int(self._first_images[block]))

    def segment_lengths(self, index: int) -> npt.NDArray[np.int32]:
        """Return the number of tokens in each segment of a row as int32[segments], without reading the tokens.

        Raises:
            DataError: The entries contradict the length of the row.
        """
        block, place = self._locate_row(index)
        tokens = self._blocks[block].tokens
        length, num_images = int(tokens.lengths[place]), int(_modes(tokens)[place])
        head = np.frombuffer(tokens.read_bytes(place, stop=min(length, _USUAL_HEAD)), dtype=np.int32)
        stop = _HEADER_LENGTH + max(int(head[0]), 0) if len(head) else length + 1
        if len(head) < stop <= length:
            head = np.frombuffer(tokens.read_bytes(place, stop=stop), dtype=np.int32)
        lengths = head[_HEADER_LENGTH:stop]
        if stop + num_images + int(lengths.sum(dtype=np.int64)) != length:
            raise DataError(f"{self.prefix}, row {index}: its head contradicts its length; prepare the data again.")
        return lengths

    def keys(self, index: int) -> list[SegmentKey]:
        """Return the origin of each segment of a row. Raises DataError if the entries are damaged."""
        block, place = self._locate_row(index)
        try:
            return [SegmentKey(*entry) for entry in json.loads(self._blocks[block].keys.read_bytes(place))]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.prefix}, row {index}: damaged keys ({error}); prepare the data again.") from error

    def image(self, index: int) -> bytes:
        """Return one encoded image. Raises DataError if there is no such image."""
        if not 0 <= index < self._first_images[-1]:
            raise DataError(
                f"{self.prefix}: a row refers to image {index} of {self._first_images[-1]}; prepare the data again."
            )
        blocks, places = self.locate_images(np.array([index]))
        return self._blocks[int(blocks[0])].images.read_bytes(int(places[0]))

    def locate_images(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Return the block of each image and its index in the files of this block; int64[n] all.

        An image that no block has gets the nearest block and an index that is not in it.
        """
        blocks = np.searchsorted(self._first_images[1:-1], indices, side="right")
        return blocks, indices - self._first_images[blocks]

    def close(self) -> None:
        """Close all files."""
        for files in self._blocks:
            for file in (files.tokens, files.images, files.keys):
                file.close()

    def _locate_row(self, index: int) -> tuple[int, int]:
        block = int(np.searchsorted(self._first_rows[1:-1], index, side="right"))
        return block, index - int(self._first_rows[block])


def _modes(tokens: IndexedFile) -> npt.NDArray[np.int8]:
    assert tokens.modes is not None
    return tokens.modes
