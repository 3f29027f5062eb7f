"""The rows of one data-parallel rank, step by step, as micro-batches.

    consumed rows ─blend─▶ rows of the global batch ─deal─▶ rows of the rank
    rows of the rank ─decode workers─▶ pixels ─collate─▶ MicroBatch

The rows of a step are a pure function of the seed and the number of rows consumed before. So the loader has no state of
its own, a run resumes from one integer, and every data-parallel size sees the same global batches. Rows are small and
are read here. Images are decoded in worker processes, a little more than one step ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megatron_vl.config.batch import num_microbatches
from megatron_vl.config.data_files import parse_data_path
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.dataset.rows import RowStore, SegmentKey
from megatron_vl.data.images.pixels import blank_pixels
from megatron_vl.data.loading.balance import deal, image_shares, row_costs, split
from megatron_vl.data.loading.batch import CollateOptions, MicroBatch, collate, empty_row
from megatron_vl.data.loading.decode_workers import DecodePool
from megatron_vl.data.loading.plan import DataPlan
from megatron_vl.data.sample import PackedRow
from megatron_vl.errors import ConfigError

PADDING_ROW = -1
"""Row id of a row of padding, which fills the last batch of a finite pass."""


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches that one data-parallel rank computes in one step."""

    micro_batches: tuple[MicroBatch, ...]
    row_ids: npt.NDArray[np.int64]
    """int64[global batch]: global rows of the whole global batch, equal on every rank. PADDING_ROW: no row."""


@dataclass(frozen=True)
class ImageShare:
    """The share of a step's images that a reader decodes, under ``vision_parallel data``."""

    rank: int
    """Place among the model-parallel ranks that encode them together."""
    size: int
    """Number of these ranks."""


@dataclass(frozen=True)
class DataShare:
    """The share of every global batch that this reader gets."""

    rank: int
    """Data-parallel rank."""
    size: int
    """Number of data-parallel ranks."""
    images: ImageShare | None = None
    """Which of the images of its rows; None for all."""


@dataclass(frozen=True)
class _Pending:
    """A micro-batch whose images are being decoded."""

    rows: list[PackedRow]
    names: list[str]
    span_images: npt.NDArray[np.int64]
    """int64[image spans]: index of the distinct image that each span shows."""
    ticket: int | None
    own: range
    """The distinct images that are decoded here."""


class DataSets:
    """Prepared data sets, opened together and checked. Rows are numbered consecutively across data sets."""

    def __init__(self, config: RunConfig, data_path: Sequence[str]) -> None:
        """Open and check every data set of ``data_path`` (prefixes, or weight and prefix in turn).

        Raises:
            ConfigError: There is no data set, or one was prepared for another model or row length.
            DataError: Files are missing or damaged.
        """
        pairs = parse_data_path(data_path)
        if not pairs:
            raise ConfigError("data.data_path is empty: give the prefix of a prepared data set")
        self.stores = [RowStore(prefix) for _, prefix in pairs]
        self.plan = DataPlan.of(config, data_path, [(store.prefix, store.manifest) for store in self.stores])
        self.blend = self.plan.blend
        self.image_files = [prefix for store in self.stores for prefix in store.block_prefixes]
        """Path prefixes of the files of images of all data sets."""
        self._first_files = np.cumsum([0, *(len(store.block_prefixes) for store in self.stores)])
        self.lengths = np.concatenate([store.row_lengths for store in self.stores])
        self.images = np.concatenate([store.row_images for store in self.stores])

    def read(self, row_id: int) -> tuple[PackedRow, str, npt.NDArray[np.int64]]:
        """Return a row, its name for messages, and its images as int64[n, 2] (index into ``image_files``, image)."""
        if row_id == PADDING_ROW:
            return empty_row(), "padding", np.zeros((0, 2), dtype=np.int64)
        store_id, index = self._find(row_id)
        store = self.stores[store_id]
        row = store.row(index)
        blocks, places = store.locate_images(row.image_ids)
        images = np.stack([self._first_files[store_id] + blocks, places], axis=1)
        return row, f"{store.prefix}, row {index}", images

    def keys(self, row_id: int) -> list[SegmentKey]:
        """Return the samples that a row holds."""
        store_id, index = self._find(row_id)
        return self.stores[store_id].keys(index)

    def name_rows(self, row_ids: npt.NDArray[np.int64]) -> list[str]:
        """Return one text for each data set with some of the rows int64[n]: its prefix and the row numbers in it."""
        store_ids, indices = self.blend.locate(np.unique(row_ids))
        return [
            f"{self.stores[store_id].prefix} rows {', '.join(str(index) for index in indices[store_ids == store_id])}"
            for store_id in np.unique(store_ids).tolist()
        ]

    def close(self) -> None:
        """Close all files."""
        for store in self.stores:
            store.close()

    def _find(self, row_id: int) -> tuple[int, int]:
        store_ids, indices = self.blend.locate(np.array([row_id]))
        return int(store_ids[0]), int(indices[0])


class RowLoader:
    """Load the batches of one data-parallel rank; see the module docstring."""

    def __init__(
        self,
        config: RunConfig,
        *,
        share: DataShare,
        with_pixels: bool = True,
        data_path: Sequence[str] | None = None,
        image_cost: float = 0.0,
    ) -> None:
        """Open the data sets of ``data_path`` (default: ``config.data.data_path``) and start the decode workers.

        ``with_pixels``: this rank holds the patch embedding. ``image_cost``: work that an image adds to a row, in
        labels, for the distribution of rows over ranks and micro-batches.

        Raises:
            ConfigError: As for ``DataSets``.
            DataError: As for ``DataSets``.
        """
        self.data_sets = DataSets(config, config.data.data_path if data_path is None else data_path)
        self._global_batch_size = config.training.global_batch_size
        self._num_micro_batches = num_microbatches(config.training, share.size)
        self._share = share
        self._image_cost = image_cost
        self._options = CollateOptions(
            special=SpecialTokens(config.model.num_bpe_tokens),
            seq_length=config.data.seq_length,
            num_queries=config.model.resampler.num_queries,
            image_size=config.model.image_size,
            attention_span=config.data.attention_span,
            with_pixels=with_pixels and share.images is None,
            blank_images=config.data.blank_images,
        )
        decodes = with_pixels and not config.data.blank_images and bool(self.data_sets.images.any())
        files = self.data_sets.image_files
        self._num_workers = config.data.num_workers
        self._pool = DecodePool(files, config.model.image_size, num_workers=self._num_workers) if decodes else None

    @property
    def num_rows(self) -> int:
        """Rows of all data sets."""
        return self.data_sets.blend.num_rows

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the decode workers."""
        return self._pool.worker_pids if self._pool else []

    def rows_of_step(self, consumed_rows: int) -> npt.NDArray[np.int64]:
        """Return the global rows of the step that begins after ``consumed_rows``, as int64[global batch]."""
        return self.data_sets.blend.step_rows(consumed_rows, self._global_batch_size)

    def steps(self, consumed_rows: int = 0) -> Iterator[StepBatch]:
        """Yield training steps without end, starting after the given number of consumed rows."""

        def batches() -> Iterator[npt.NDArray[np.int64]]:
            first = consumed_rows
            while True:
                yield self.rows_of_step(first)
                first += self._global_batch_size

        return self._load(batches())

    def one_pass(self, data_set: int = 0, *, max_steps: int = 0) -> Iterator[StepBatch]:
        """Yield every row of a data set once, in the stored order; padding rows fill the last batch.

        ``max_steps``: stop after this number of steps; 0 for no limit.
        """
        sizes = self.data_sets.blend.sizes
        first, count, size = sum(sizes[:data_set]), sizes[data_set], self._global_batch_size
        num_steps = -(-count // size)
        if max_steps:
            num_steps = min(num_steps, max_steps)
        ids = np.full(num_steps * size, PADDING_ROW, dtype=np.int64)
        ids[: min(count, len(ids))] = first + np.arange(min(count, len(ids)))
        return self._load(iter(ids.reshape(num_steps, size)))

    def name_rows(self, consumed_rows: int, places: Sequence[tuple[int, int]] = ()) -> list[str]:
        """Return one text for each data set that has rows of the step that begins after ``consumed_rows``.

        ``places``: name only the rows of these micro-batches, each given as (data-parallel rank, index).
        """
        row_ids = self.rows_of_step(consumed_rows)
        chosen = [row_ids[self._positions(row_ids, rank)[index]] for rank, index in places] or [row_ids]
        return self.data_sets.name_rows(np.concatenate(chosen))

    def close(self) -> None:
        """End the decode workers and close all files."""
        if self._pool is not None:
            self._pool.close()
        self.data_sets.close()

    def _load(self, batches: Iterator[npt.NDArray[np.int64]]) -> Iterator[StepBatch]:
        """Yield whole steps, and read and request micro-batches ahead; ``batches`` yields int64[global batch]."""
        ahead = self._num_micro_batches + 2 * self._num_workers
        pending: deque[_Pending] = deque()
        steps: deque[npt.NDArray[np.int64]] = deque()
        requests = self._requests(batches, steps)
        if self._pool is not None:
            self._pool.forget()
        while True:
            while len(pending) < ahead and (request := next(requests, None)) is not None:
                pending.append(request)
            if not pending:
                return
            micro_batches = []
            for _ in range(self._num_micro_batches):
                micro_batches.append(self._collate(pending.popleft()))
                if (request := next(requests, None)) is not None:
                    pending.append(request)
            yield StepBatch(tuple(micro_batches), steps.popleft())

    def _requests(
        self, batches: Iterator[npt.NDArray[np.int64]], steps: deque[npt.NDArray[np.int64]]
    ) -> Iterator[_Pending]:
        """Yield the micro-batches of this rank and request their images; append the rows of each step to ``steps``."""
        for row_ids in batches:
            steps.append(row_ids)
            mine = self._positions(row_ids, self._share.rank)
            read = [[self.data_sets.read(row_id) for row_id in row_ids[positions].tolist()] for positions in mine]
            distinct = [np.unique(_images_of(rows), axis=0, return_inverse=True) for rows in read]
            shares = self._shares([len(images) for images, _ in distinct])
            for rows, (images, shown), own in zip(read, distinct, shares, strict=True):
                wanted = images[own.start : own.stop]
                ticket = self._pool.submit(wanted) if self._pool is not None and len(wanted) else None
                yield _Pending(
                    [row for row, _, _ in rows], [name for _, name, _ in rows], shown.reshape(-1), ticket, own
                )

    def _shares(self, counts: list[int]) -> list[range]:
        """Return which of the distinct images of each micro-batch are decoded here."""
        if self._share.images is None:
            return [range(count) for count in counts]
        if self._options.blank_images:
            counts = [min(count, 1) for count in counts]
        return image_shares(counts, rank=self._share.images.rank, size=self._share.images.size)

    def _positions(self, row_ids: npt.NDArray[np.int64], rank: int) -> npt.NDArray[np.int64]:
        """Return the positions in the global batch that a data-parallel rank computes, as int64[micro-batches, rows].

        ``row_ids`` is int64[global batch].
        """
        real = row_ids != PADDING_ROW
        lengths = np.where(real, self.data_sets.lengths[row_ids], 0)
        images = np.where(real, self.data_sets.images[row_ids], 0)
        costs = row_costs(lengths, images, image_cost=self._image_cost)
        mine = deal(costs, num_ranks=self._share.size)[rank]
        return split(costs, mine, num_micro_batches=self._num_micro_batches)

    def _collate(self, pending: _Pending) -> MicroBatch:
        pixels = None
        if pending.ticket is not None:
            assert self._pool is not None
            pixels = self._pool.result(pending.ticket)
        batch = collate(pending.rows, pixels, self._options, names=pending.names, span_images=pending.span_images)
        if self._share.images is None:
            return batch
        own = blank_pixels(len(pending.own), self._options.image_size) if pixels is None else pixels
        return replace(batch, pixels=torch.from_numpy(own))


def _images_of(rows: list[tuple[PackedRow, str, npt.NDArray[np.int64]]]) -> npt.NDArray[np.int64]:
    return np.concatenate([images for _, _, images in rows])
