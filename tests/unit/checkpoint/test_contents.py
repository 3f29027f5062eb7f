"""What a checkpoint holds and what it does not; one that a rank cannot write is refused by all, and nothing is left."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from megatron_vl.checkpoint import contents, store
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.model.build import build_model
from megatron_vl.model.sharding import ShardedModule
from megatron_vl.parallel import rng
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config


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


class _Engine(nn.Module):
    """A module with an extra state, as Transformer Engine's have: bytes that it unpickles when it is given them."""

    def __init__(self, marker: Path | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.marker = marker

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(_Attack(self.marker))), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None:
            pickle.loads(state.numpy().tobytes())  # noqa: S301 - what is tested is that it is never called


class _Attack:
    def __init__(self, marker: Path | None) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class _Chunk(ShardedModule):
    """A chunk that describes its weight and, as Megatron-Core's layers do, its extra state."""

    def __init__(self, topology: Topology, marker: Path | None) -> None:
        super().__init__(topology.groups)
        self.norm = _Engine(marker)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        name = "norm._extra_state"
        state = ShardedObject(name, self.norm.get_extra_state(), (1,), (0,), replica_id=0)
        return super().sharded_state_dict(*args, **kwargs) | {name: state}


def _save_and_load_extra_state(start: Start, config: RunConfig, root: Path, marker: Path) -> list[Any]:
    """Save, once without what keeps extra states out; load both with it: the weight, and what each file holds."""
    from torch.distributed.checkpoint import FileSystemReader

    with start.topology(config.parallel) as topology:
        found: list[Any] = []
        for step, suffix in enumerate(["_extra_state", "nothing"]):
            hostile = contents.Trained([_Chunk(topology, marker)], None)
            with mock.patch.object(contents, "_EXTRA_STATE", suffix):
                path = contents.save(hostile, {"step": step}, config=config, topology=topology, root=root)
            honest = _Chunk(topology, None)
            nn.init.zeros_(honest.norm.weight)
            contents.load(contents.Trained([honest], None), path, config=config, topology=topology)
            held = FileSystemReader(path).read_metadata().state_dict_metadata
            # 0.19 keeps what is not a tensor among the tensors as well.
            names = [name for name in held if not name.startswith("common_state")]
            found.append((honest.norm.weight.tolist(), sorted(names)))
        return found


def test_the_extra_state_of_a_file_is_never_unpickled(ranks: RankPools, tmp_path: Path) -> None:
    """Neither is ours written, nor a hostile one given to the module, which would run its code."""
    marker = tmp_path / "marker"
    (written, ours), (read, hostile) = ranks(1).run(_save_and_load_extra_state, tiny_config(), tmp_path, marker)[0]
    assert not marker.exists()
    assert written == read == [1.0] * 3
    assert ours == ["norm.weight"] and len(hostile) == 2


def _stored_of_the_optimizer(start: Start, config: RunConfig, bucket_size: int | None) -> dict[str, int]:
    """The optimizer's tensors that this rank describes for a save, and their elements."""
    from functools import partial

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from megatron_vl.training import parallel_model

    few = partial(parallel_model.DistributedDataParallelConfig, bucket_size=bucket_size)
    with (
        mock.patch.object(parallel_model, "DistributedDataParallelConfig", few),
        start.topology(config.parallel) as topology,
    ):
        model = build_parallel_model(config, topology)
        train_step(model, micro_batches(config.model, 1), config=config, topology=topology, step=0)
        state = contents._tensors(contents.Trained(model.chunks, model.optimizer), topology)["optimizer"]
        return {value.key: value.data.numel() for value in nested_values(state) if isinstance(value, ShardedBase)}


@pytest.mark.parametrize("bucket_size", [None, 3000])
def test_data_parallel_ranks_share_the_optimizer_of_a_save(ranks: RankPools, bucket_size: int | None) -> None:
    """Each stores other parameters, whole, and about as much as the others, also where each parameter is divided."""
    config = tiny_config(parallel={"use_distributed_optimizer": True, "overlap_grad_reduce": bucket_size is not None})
    alone = ranks(1).run(_stored_of_the_optimizer, config, bucket_size)[0]
    first, second = ranks(2).run(_stored_of_the_optimizer, config, bucket_size)
    assert len(alone) > 100 and first | second == alone and not first.keys() & second.keys()
    assert max(sum(first.values()), sum(second.values())) <= 0.55 * sum(alone.values())


def _restored_streams(start: Start, config: RunConfig, root: Path) -> list[bool]:
    """Whether a load restores the random streams of a CPU, of a GPU, and of a checkpoint that does not say."""
    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        path = contents.save(trained, {"step": 1}, config=config, topology=topology, root=root)
        manifest = store.read_manifest(path)
        restored = []
        for device in ({"device": "cpu"}, {"device": "cuda"}, {}):
            sizes = {name: size for name, size in manifest["layout"].items() if name != "device"}
            changed = manifest | {"layout": sizes | device}
            with (
                mock.patch.object(store, "read_manifest", mock.Mock(return_value=changed)),
                mock.patch.object(rng, "load_state_dict") as load,
            ):
                contents.load(trained, path, config=config, topology=topology)
            restored.append(load.called)
        return restored


def test_random_streams_go_to_the_kind_of_device_that_they_are_of(ranks: RankPools, tmp_path: Path) -> None:
    """torch refuses the state of a CPU's generator for a GPU's; all checkpoints that do not say are of CPUs."""
    assert ranks(1).run(_restored_streams, tiny_config(), tmp_path) == [[True, False, True]]


def _save_where_files_are_limited(start: Start, config: RunConfig, root: Path, limit: int) -> str:
    """Save while no file may grow beyond a limit, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            contents.save(trained, {"step": 3}, config=config, topology=topology, root=root)
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "saved"


@pytest.mark.parametrize("limit", [700, 100_000])
def test_a_full_disk_is_called_so(ranks: RankPools, tmp_path: Path, limit: int) -> None:
    """torch alone says "unexpected pos 704 vs 598" or "iostream error"."""
    (message,) = ranks(1).run(_save_where_files_are_limited, tiny_config(), tmp_path, limit)
    assert "the disk is full, or a quota" in message or "File too large" in message
    assert list(tmp_path.iterdir()) == []


def _load_with_failure(start: Start, config: RunConfig, root: Path, failure: BaseException, failing: int = 0) -> str:
    """Load while reading fails on one rank; what comes of it."""
    from torch.distributed.checkpoint import FileSystemReader

    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        saved = contents.save(trained, {"step": 3}, config=config, topology=topology, root=root)
        plain = FileSystemReader.read_data

        def read_data(*arguments: Any) -> Any:
            if topology.rank == failing:
                raise failure
            return plain(*arguments)

        with mock.patch.object(FileSystemReader, "read_data", read_data):
            try:
                contents.load(trained, saved, config=config, topology=topology)
            except (CheckpointError, KeyboardInterrupt) as error:
                return f"{type(error).__name__}: {error}"
        return "loaded"


def test_an_interrupt_while_loading_is_no_damage_and_an_error_is_one_line(ranks: RankPools, tmp_path: Path) -> None:
    """torch wraps both, with the traceback of each in the text."""
    pool = ranks(1)
    assert pool.run(_load_with_failure, tiny_config(), tmp_path / "a", KeyboardInterrupt()) == ["KeyboardInterrupt: "]
    broken = OSError(errno.EIO, os.strerror(errno.EIO), "x.distcp")
    (said,) = pool.run(_load_with_failure, tiny_config(), tmp_path / "b", broken)
    assert said.endswith("cannot be loaded: rank 0: x.distcp: Input/output error") and "\n" not in said


def test_no_rank_goes_on_if_one_cannot_read(ranks: RankPools, tmp_path: Path) -> None:
    """Also where each rank reads alone: its peers would wait for it."""
    broken = OSError(errno.EIO, os.strerror(errno.EIO), "x.distcp")
    said = ranks(2).run(_load_with_failure, tiny_config(), tmp_path, broken, 1)
    assert all(text.startswith("CheckpointError: ") for text in said)
    assert "cannot be loaded: rank 1: x.distcp: Input/output error" in said[0]
