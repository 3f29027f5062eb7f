"""The files of one part: the output of a unit of work, and the input of the merge.

    <part>.bin    sample after sample: its new images, its tokens (targets complemented, see rows.py), its key
    <part>.npz    columns: positions in the .bin, the outcome of every record, the size of the .bin. Written last.

The writing process writes both under temporary names and then renames them, so a part is complete or absent. This holds
even if the last writer of a killed run is still working while the next run makes the same part again. Writing a part
takes some 75 bytes of memory per sample with an image. A bounded memory of images recognizes repeated files. An image
that it has forgotten is stored twice in the part, but once in the data set.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.columns import Columns, load_columns, store_columns
from megatron_vl.data.dataset.manifest import NUM_EXAMPLES
from megatron_vl.data.dataset.rows import split_tokens
from megatron_vl.data.formats.shard import Skipped
from megatron_vl.files import whole_file

IntArray = npt.NDArray[np.int64]

_REMEMBERED_IMAGES = 65_536
_COLUMNS: dict[str, str] = {
    "outcomes": "h", "tasks": "b", "offsets": "q", "lengths": "i", "key_sizes": "i", "image_counts": "h",
    "image_ids": "i", "image_offsets": "q", "image_sizes": "i", "dhashes": "Q",
}  # fmt: skip
_OF_FILES = frozenset({"missing_image", "unreadable_file"})
KEPT = -1


@dataclass(frozen=True)
class Example:
    """One of the first samples that were left out for a reason."""

    position: int
    """Index of the record in the unit."""
    reason: str
    text: str


@dataclass(frozen=True)
class PartIndex:
    """The contents of a finished part. All arrays but ``outcomes`` have one entry per kept sample or stored image."""

    reasons: tuple[str, ...]
    examples: tuple[Example, ...]
    outcomes: npt.NDArray[np.int16]
    """int16[records]: KEPT, or the index of the reason for which the record was left out."""
    tasks: npt.NDArray[np.int8]
    """int8[samples]: index into TASKS."""
    offsets: IntArray
    """int64[samples]: first byte of the tokens. The key follows the tokens."""
    lengths: npt.NDArray[np.int32]
    """int32[samples]: tokens."""
    key_sizes: npt.NDArray[np.int32]
    """int32[samples]: bytes of the key."""
    image_counts: npt.NDArray[np.int16]
    """int16[samples]: number of images."""
    image_ids: npt.NDArray[np.int32]
    """int32[sum of image_counts]: images of sample after sample, as indices into the images of the part."""
    image_offsets: IntArray
    """int64[images]: first byte."""
    image_sizes: npt.NDArray[np.int32]
    """int32[images]: bytes."""
    digests: npt.NDArray[np.uint8]
    """uint8[images, 32]: SHA-256."""
    dhashes: npt.NDArray[np.uint64]
    """uint64[images]: perceptual hash; 0 if it was not requested."""
    num_scored: int
    """Records with a score, kept or not."""
    largest_token: int
    """Largest id of all samples; -1 if there is none."""

    @property
    def num_samples(self) -> int:
        """Number of kept samples."""
        return len(self.lengths)

    @property
    def lacks_files(self) -> bool:
        """Whether images of records were missing or unreadable. This may have changed since."""
        return not _OF_FILES.isdisjoint(self.reasons)


class PartWriter:
    """Writer of one part; see :func:`write_part_files`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}
        self._digests = bytearray()
        self._reasons: dict[str, int] = {}
        self._examples: list[Example] = []
        self._examples_of: Counter[str] = Counter()
        self._remembered: dict[bytes, int] = {}
        self._num_scored = 0
        self._largest_token = -1

    @property
    def num_samples(self) -> int:
        """Number of samples that were stored so far."""
        return len(self._columns["lengths"])

    def count_score(self) -> None:
        """Count a sample that has a score."""
        self._num_scored += 1

    def find_image(self, digest: bytes) -> int | None:
        """Return the number of the stored image with this SHA-256, if it was stored recently; else None."""
        return self._remembered.get(digest)

    def skip(self, skipped: Skipped) -> None:
        """Count a record that was left out, and list it if it is among the first of its reason."""
        reason = self._reasons.setdefault(skipped.reason, len(self._reasons))
        if self._examples_of[skipped.reason] < NUM_EXAMPLES:
            self._examples_of[skipped.reason] += 1
            text = f"{skipped.key}: {skipped.detail}" if skipped.detail else skipped.key
            self._examples.append(Example(len(self._columns["outcomes"]), skipped.reason, text))
        self._columns["outcomes"].append(reason)

    def add_image(self, data: bytes, digest: bytes, image_hash: int) -> int:
        """Store an image; return its number in the part."""
        number = len(self._columns["image_sizes"])
        self._append(image_offsets=self._file.tell(), image_sizes=len(data), dhashes=image_hash)
        self._digests += digest
        self._file.write(data)
        self._remembered[digest] = number
        if len(self._remembered) > _REMEMBERED_IMAGES:
            del self._remembered[next(iter(self._remembered))]
        return number

    def add_sample(self, joined: npt.NDArray[np.int32], key: str, *, task: int, images: list[int]) -> None:
        """Store a sample whose images are stored. ``joined`` is int32[length] from ``join_tokens``."""
        stored_key = key.encode("utf-8", "surrogatepass")
        self._append(
            outcomes=KEPT, tasks=task, offsets=self._file.tell(), lengths=len(joined), key_sizes=len(stored_key),
            image_counts=len(images),
        )  # fmt: skip
        self._columns["image_ids"].extend(images)
        self._largest_token = max(self._largest_token, int(split_tokens(joined)[0].max(initial=-1)))
        self._file.write(joined.astype("<i4").data)
        self._file.write(stored_key)

    def columns(self) -> Columns:
        """Return the columns of the finished part."""
        header = {
            "size": self._file.tell(), "reasons": list(self._reasons), "num_scored": self._num_scored,
            "largest_token": self._largest_token,
            "examples": [[item.position, item.reason, item.text] for item in self._examples],
        }  # fmt: skip
        columns = {name: np.frombuffer(values, values.typecode) for name, values in self._columns.items() if values}
        columns["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        columns["digests"] = np.frombuffer(bytes(self._digests), np.uint8)
        return columns

    def _append(self, **values: int) -> None:
        for name, value in values.items():
            self._columns[name].append(value)


@contextmanager
def write_part_files(prefix: Path) -> Iterator[PartWriter]:
    """Yield a writer. After the block, its data is on the disk; after an error, no file remains."""
    with whole_file(data_path(prefix), durable=True) as draft, draft.open("wb") as file:
        writer = PartWriter(file)
        yield writer
        columns = writer.columns()
    store_columns(index_path(prefix), columns)


def data_path(prefix: Path) -> Path:
    """Return the path ``<part>.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def index_path(prefix: Path) -> Path:
    """Return the path ``<part>.npz``."""
    return prefix.with_name(prefix.name + ".npz")


def read_index(prefix: Path) -> PartIndex | None:
    """Return the contents of a part, or None if it is absent or incomplete."""
    stored = load_columns(index_path(prefix))
    try:
        if stored is None:
            return None
        header = json.loads(stored["header"].tobytes())
        digests = stored["digests"].reshape(-1, 32)
        if data_path(prefix).stat().st_size != header["size"]:
            return None
        num_scored, largest_token = int(header["num_scored"]), int(header["largest_token"])
    except (OSError, ValueError, KeyError):
        return None
    columns = {name: values for name, values in stored.items() if name in _COLUMNS}
    empty = {name: np.zeros(0, dtype=np.dtype(code)) for name, code in _COLUMNS.items()}
    examples = tuple(Example(*example) for example in header["examples"])
    return PartIndex(
        tuple(header["reasons"]), examples, digests=digests, num_scored=num_scored, largest_token=largest_token,
        **{**empty, **columns},
    )  # fmt: skip
