"""A checkpoint that one rank cannot write is refused by all of them, with that rank's reason, and nothing is left."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vl.checkpoint import contents, store
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.model.build import build_model
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _bad_bucket(_: Any, number: int, _bucket: Any, results: Any, *__: Any) -> None:
    """What Megatron-Core's writer does with an error: it hands it on."""
    results.put((number, OSError(errno.ENOSPC, "No space left on device")))


def _save_with_failure(start: Start, config: RunConfig, root: Path, place: str, rank: int) -> str:
    """Save while ``place`` fails on one rank; every rank's message."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    broken = {
        "staging": mock.patch.object(store, "open_staging", _no_space),
        "tensors": mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(_bad_bucket)),
        "config": mock.patch.object(contents, "dump_config", _no_space),
        "records": mock.patch.object(store, "record_file", _no_space),
        "commit": mock.patch.object(store, "commit", _no_space),
    }
    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        with broken[place] if topology.rank == rank else mock.MagicMock():
            try:
                contents.save(trained, {"step": 3}, config=config, topology=topology, root=root)
            except CheckpointError as error:
                return str(error)
        return "saved"


@pytest.mark.parametrize(
    ("place", "rank"),
    [("staging", 0), ("tensors", 0), ("tensors", 1), ("config", 0), ("records", 1), ("commit", 0)],
)
def test_a_rank_that_cannot_write_is_named_by_all(ranks: RankPools, tmp_path: Path, place: str, rank: int) -> None:
    config = tiny_config(parallel={"pipeline_model_parallel_size": 2})
    messages = ranks(2).run(_save_with_failure, config, tmp_path, place, rank)
    for message in messages:
        assert message.startswith(f"{tmp_path}: the checkpoint was not written: ")
    # Of a failure within Megatron-Core only the first rank learns the reason.
    for message in messages[:1] if place == "tensors" else messages:
        assert f"rank {rank}: " in message and "No space left on device" in message
    assert store.steps_in(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".staging")] == []
