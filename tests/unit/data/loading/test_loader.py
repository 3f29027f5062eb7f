"""The same rows at every data-parallel size and after every restart, and workers that fail with a word."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.images.decode import to_pixels
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.data.loading.decode_workers import DecodePool
from megatron_vl.data.loading.loader import PADDING_ROW, DataSets, DataShare, ImageShare, RowLoader, StepBatch
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.prepared import NUM_CAPTIONS, NUM_DOCUMENTS, SEQ_LENGTH, make_data_set, run_config


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data_set(tmp_path_factory.mktemp("data"))


def take(loader: RowLoader, count: int, consumed_rows: int = 0) -> list[StepBatch]:
    steps = list(itertools.islice(loader.steps(consumed_rows), count))
    loader.close()
    return steps


def equal(left: MicroBatch, right: MicroBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(left).values(), vars(right).values(), strict=True)
    )


def row_bytes(batches: list[MicroBatch]) -> Counter[bytes]:
    """The rows of micro-batches, in any order."""
    return Counter(row.numpy().tobytes() for batch in batches for row in batch.tokens.view(-1, SEQ_LENGTH))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_global_batch_holds_the_same_rows_at_every_size(prefix: str, weighted: bool) -> None:
    config = run_config(*(("0.7", prefix, "0.3", prefix) if weighted else (prefix,)))
    reference = take(RowLoader(config, share=DataShare(0, 1)), 5)
    for dp_size in (2, 4):
        ranks = [take(RowLoader(config, share=DataShare(rank, dp_size), image_cost=9.0), 5) for rank in range(dp_size)]
        for step, expected in enumerate(reference):
            together = [batch for rank in ranks for batch in rank[step].micro_batches]
            assert len(together) == 4
            assert row_bytes(together) == row_bytes(list(expected.micro_batches))
            assert all(np.array_equal(rank[step].row_ids, expected.row_ids) for rank in ranks)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_step_can_be_the_first(prefix: str, num_workers: int) -> None:
    whole = take(RowLoader(run_config(prefix), share=DataShare(1, 2)), 6)
    late = take(RowLoader(run_config(prefix, num_workers=num_workers), share=DataShare(1, 2)), 3, consumed_rows=24)
    for expected, found in zip(whole[3:], late, strict=True):
        assert np.array_equal(expected.row_ids, found.row_ids)
        assert all(equal(a, b) for a, b in zip(expected.micro_batches, found.micro_batches, strict=True))


def test_pixels_are_those_of_the_rows(prefix: str) -> None:
    loader = RowLoader(run_config(prefix, num_workers=1), share=DataShare(0, 1))
    for step in itertools.islice(loader.steps(0), 3):
        expected, found = Counter[bytes](), Counter[bytes]()
        for row_id in step.row_ids.tolist():
            row, _, _ = loader.data_sets.read(row_id)
            store = loader.data_sets.stores[0]
            expected.update(to_pixels(store.image(image), 56).tobytes() for image in row.image_ids.tolist())
        for batch in step.micro_batches:
            assert batch.pixels is not None
            assert len(batch.pixels) == batch.num_images == max(len(batch.slots) // 4, 1)
            found.update(image.numpy().tobytes() for image in batch.pixels[: len(batch.slots) // 4])
        assert found == expected
    loader.close()


def test_one_pass_holds_every_row_once_and_fills_up_with_padding(prefix: str) -> None:
    config = run_config(prefix)
    loaders = [RowLoader(config, share=DataShare(rank, 2)) for rank in range(2)]
    passes = [list(loader.one_pass()) for loader in loaders]
    ids = np.concatenate([step.row_ids for step in passes[0]])
    num_rows = loaders[0].num_rows
    assert sorted(ids[ids != PADDING_ROW]) == list(range(num_rows))
    assert len(ids) % 8 == 0
    assert len(ids) - num_rows < 8
    batches = [batch for steps in passes for step in steps for batch in step.micro_batches]
    assert sum(batch.num_tokens for batch in batches) == loaders[0].data_sets.stores[0].manifest.num_tokens
    keys = {(key.key, key.start) for row in range(num_rows) for key in loaders[0].data_sets.keys(row)}
    assert len({key for key, _ in keys}) == NUM_CAPTIONS + NUM_DOCUMENTS
    assert len(list(loaders[0].one_pass(max_steps=2))) == 2
    assert [step.row_ids.tolist() for step in loaders[0].one_pass()] == [step.row_ids.tolist() for step in passes[0]]


def test_one_pass_counts_the_samples_of_the_manifest(prefix: str) -> None:
    """Of a document that is cut, only one piece counts."""
    loader = RowLoader(run_config(prefix), share=DataShare(0, 1))
    counted = sum(batch.num_samples for step in loader.one_pass() for batch in step.micro_batches)
    manifest = read_manifest(prefix)
    assert counted == manifest.num_samples < manifest.num_segments


def test_one_pass_of_each_data_set(prefix: str) -> None:
    loader = RowLoader(run_config(prefix, prefix), share=DataShare(0, 1))
    size = loader.num_rows // 2
    for data_set in range(2):
        ids = np.concatenate([step.row_ids for step in loader.one_pass(data_set)])
        assert ids[ids != PADDING_ROW].tolist() == list(range(data_set * size, (data_set + 1) * size))
    assert np.concatenate([step.row_ids for step in loader.one_pass(1, max_steps=1)]).tolist() == [
        *range(size, size + 8)
    ]


@pytest.mark.parametrize("blank_images", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_that_encode_together_share_the_images_of_a_step(prefix: str, size: int, blank_images: bool) -> None:
    """Their pixels in order are those of a rank that reads all; the numbers of images differ by one at most."""
    config = run_config(prefix, blank_images=blank_images)
    whole = take(RowLoader(config, share=DataShare(0, 2)), 4)
    shares = [take(RowLoader(config, share=DataShare(0, 2, ImageShare(rank, size))), 4) for rank in range(size)]
    for number, step in enumerate(whole):
        own = [share[number].micro_batches for share in shares]
        for index, batch in enumerate(step.micro_batches):
            parts = [batches[index] for batches in own]
            assert all(equal(replace(part, pixels=None), replace(batch, pixels=None)) for part in parts)
            shown = batch.pixels[: batch.work.num_images]  # a text-only micro-batch has a blank image that nobody needs
            assert torch.equal(torch.cat([part.pixels for part in parts]), shown)
        numbers = [sum(len(batch.pixels) for batch in batches) for batches in own]
        assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("with_pixels", [False, True])
def test_ranks_without_pixels_and_blank_images_decode_nothing(prefix: str, with_pixels: bool) -> None:
    config = run_config(prefix, num_workers=2, blank_images=with_pixels)
    loader = RowLoader(config, share=DataShare(0, 1), with_pixels=with_pixels)
    assert loader.worker_pids == []
    (step,) = take(loader, 1)
    assert all((batch.pixels is not None) == with_pixels for batch in step.micro_batches)


def test_a_data_set_must_fit_the_run(prefix: str, tmp_path: Path) -> None:
    config = run_config(prefix)
    for changed, message in (
        (run_config(prefix, seq_length=SEQ_LENGTH - 1), "rows of up to 64 tokens"),
        (run_config(prefix, unpacked=True), "packed rows"),
        (run_config(), "data.data_path is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataSets(changed, changed.data.data_path)
    other = make_data_set(tmp_path, num_queries=2)
    with pytest.raises(ConfigError, match=r"num_queries = 2, this run has 4"):
        DataSets(config, (other,))
    with pytest.raises(DataError, match="nowhere.json"):
        DataSets(config, (str(tmp_path / "nowhere"),))


def test_samples_per_row_is_the_manifests(prefix: str) -> None:
    data_sets = DataSets(run_config(prefix), (prefix,))
    manifest = data_sets.stores[0].manifest
    assert data_sets.plan.samples_per_row == pytest.approx((NUM_CAPTIONS + NUM_DOCUMENTS) / manifest.num_rows)


# Workers


@pytest.fixture
def pool(prefix: str) -> Iterator[DecodePool]:
    made = DecodePool([prefix], 14, num_workers=1, timeout=120.0)
    yield made
    made.close()


def request(*images: int) -> Any:
    return np.array([(0, image) for image in images], dtype=np.int64).reshape(-1, 2)


def test_workers_give_what_this_process_gives(pool: DecodePool, prefix: str) -> None:
    here = DecodePool([prefix], 14, num_workers=0)
    tickets = [pool.submit(request(*range(n))) for n in (3, 0, 5)]
    for ticket, count in zip(tickets, (3, 0, 5), strict=True):
        assert np.array_equal(pool.result(ticket), here.result(here.submit(request(*range(count)))))


def test_pixels_stay_the_same_when_a_worker_changes_to_compiled_code(pool: DecodePool) -> None:
    every = range(15)
    first = pool.result(pool.submit(request(*every)))
    for _ in range(12):  # it changes after 100 images, if it can, some time later
        assert np.array_equal(pool.result(pool.submit(request(*every))), first)


def test_results_nobody_collects_are_dropped(pool: DecodePool) -> None:
    pool.submit(request(0))
    pool.forget()
    assert len(pool.result(pool.submit(request(1, 2)))) == 2


def test_a_dead_worker_is_an_error(pool: DecodePool) -> None:
    (pid,) = pool.worker_pids
    pool.result(pool.submit(request(0)))
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"decode worker 0 \(process {pid}\) ended with status -9"):
            pool.result(pool.submit(request(0)))


def test_a_hung_worker_is_an_error(prefix: str) -> None:
    pool = DecodePool([prefix], 14, num_workers=1, timeout=0.3)
    (pid,) = pool.worker_pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="did not answer within 0.3 s"):
        pool.result(pool.submit(request(0)))
    os.kill(pid, signal.SIGKILL)
    pool.close()


def test_a_worker_outlives_the_signals_to_stop_and_ends_with_its_input(pool: DecodePool) -> None:
    (pid,) = pool.worker_pids
    pool.result(pool.submit(request(0)))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert len(pool.result(pool.submit(request(0)))) == 1
    pool.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, num_workers: int) -> None:
    prefix = make_data_set(tmp_path)
    path = Path(f"{prefix}.images.bin")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))  # the later images are not images
    pool = DecodePool([prefix], 14, num_workers=num_workers)
    with pytest.raises(DataError, match=r"set\.images: image 14: unreadable_image"):
        pool.result(pool.submit(request(0, 14, 1)))
    pool.close()
