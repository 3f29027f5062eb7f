"""What a checkpoint holds, and how it is written and read by all ranks together.

Weights and optimizer state go through Megatron-Core's distributed checkpointing: each tensor is stored under its
global name with its global shape, so any tensor x pipeline x data layout loads what any other has saved. Beside them
lie the resolved configuration (``config.yaml``), progress (``state.json``) and each rank's random streams (``rng.pt``),
which are restored only on the layout that wrote them: nothing else maps one rank's stream onto another's.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import nn

from megatron_vl.checkpoint import store
from megatron_vl.config.load import dump_config, load_config
from megatron_vl.config.schema import ModelConfig, RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel import rng
from megatron_vl.parallel.topology import Topology

HASH_LIMIT_BYTES = 8 * 2**30
"""Checkpoints up to this size are read twice at load: once to compare every file with its recorded SHA-256."""

_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


class ShardedChunk(Protocol):
    """A model chunk that can describe and take its tensors."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


class ShardedOptimizer(Protocol):
    """An optimizer that can describe and take its state."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: Any = None
    ) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What a checkpoint is made of, on this rank."""

    chunks: Sequence[ShardedChunk]
    optimizer: ShardedOptimizer | None


def save(
    trained: Trained, progress: dict[str, Any], *, config: RunConfig, topology: Topology, root: Path
) -> Path:
    """Write and commit a checkpoint; every rank calls it.

    Args:
        progress: fields of the training state; ``step`` names the checkpoint.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: a rank could not write; nothing was committed.
    """
    staging = _shared_path(store.open_staging(root, progress["step"]) if topology.rank == 0 else None)
    failure = ""
    try:
        dist_checkpointing.save(_tensors(trained, loading=False), str(staging))
        streams = _gather_streams(topology)
        if topology.rank == 0:
            (staging / "config.yaml").write_text(dump_config(config))
            (staging / "state.json").write_text(json.dumps(progress, indent=1))
            torch.save(streams, staging / "rng.pt")
    except (OSError, RuntimeError) as error:
        failure = f"rank {topology.rank}: {error}"
    files = _gather_files(staging, topology, failure)
    if topology.rank == 0:
        store.commit(staging, root, step=progress["step"], files=files, facts=_facts(topology))
        store.retain(root, config.checkpoint.keep_last)
    dist.barrier()
    return store.directory_of(root, progress["step"])


def load(
    trained: Trained, path: Path, *, config: RunConfig, topology: Topology, load_rng: bool = True
) -> dict[str, Any]:
    """Load a checkpoint into the model, and into the optimizer if one is given; every rank calls it.

    Args:
        path: a checkpoint, or a directory of them (the newest is taken).

    Returns:
        The progress that was saved with it.

    Raises:
        CheckpointError: there is none, a file is missing or corrupt, or it is of another model.
    """
    checkpoint = store.resolve(path)
    manifest = store.read_manifest(checkpoint)
    if topology.rank == 0:
        total = sum(entry["size"] for entry in manifest["files"].values())
        store.verify(checkpoint, hashes=total <= HASH_LIMIT_BYTES)
    dist.barrier()
    check_same_model(config.model, read_config(checkpoint).model, checkpoint)
    _load_tensors(trained, checkpoint)
    if load_rng and manifest["layout"] == _layout(topology):
        streams = torch.load(checkpoint / "rng.pt", weights_only=True)
        rng.load_state_dict(streams[topology.rank])
    progress: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return progress


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration that was saved with a checkpoint."""
    return load_config(checkpoint / "config.yaml")


def check_same_model(wanted: ModelConfig, saved: ModelConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose sizes are not the run's. The image size may differ: the weights do not depend on it.

    Raises:
        CheckpointError: lists every size that differs.
    """
    differences = []
    for part in ("vision", "resampler", "language"):
        ours, theirs = vars(getattr(wanted, part)), vars(getattr(saved, part))
        differences += [
            f"{part}.{name} is {theirs[name]} in the checkpoint and {value} in this run"
            for name, value in ours.items()
            if theirs[name] != value
        ]
    if wanted.num_ranks != saved.num_ranks:
        differences.append(f"num_ranks is {saved.num_ranks} in the checkpoint and {wanted.num_ranks} in this run")
    if differences:
        raise CheckpointError(f"{checkpoint} is of another model: " + "; ".join(differences))


def _tensors(trained: Trained, *, loading: bool) -> dict[str, Any]:
    model: dict[str, Any] = {}
    for chunk in trained.chunks:
        model.update(chunk.sharded_state_dict())
    state: dict[str, Any] = {"model": model}
    if trained.optimizer is not None:
        state["optimizer"] = trained.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_OPTIMIZER_FORMAT
        )
    return state


def _load_tensors(trained: Trained, checkpoint: Path) -> None:
    # torch's CheckpointException derives from BaseException, so that is what has to be caught by name.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        loaded = dist_checkpointing.load(_tensors(trained, loading=True), str(checkpoint))
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be loaded: {error}") from error
    for chunk in trained.chunks:
        assert isinstance(chunk, nn.Module)
        names = chunk.state_dict().keys()
        chunk.load_state_dict({name: loaded["model"][name] for name in names})
    if trained.optimizer is not None:
        with torch.no_grad():
            trained.optimizer.load_state_dict(loaded["optimizer"])


def _shared_path(path: Path | None) -> Path:
    """Rank 0's path, on every rank."""
    box = [path]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _gather_streams(topology: Topology) -> list[dict[str, Any]]:
    streams: list[Any] = [None] * topology.world_size
    dist.all_gather_object(streams, rng.state_dict())
    return streams


def _gather_files(staging: Path, topology: Topology, failure: str) -> list[store.FileRecord]:
    """Each rank records what it wrote, rank 0 also what belongs to all; any failure is everybody's."""
    own = [path for path in staging.iterdir() if path.name.startswith(f"__{topology.rank}_")]
    common = [path for path in staging.iterdir() if not path.name.startswith("__")] if topology.rank == 0 else []
    records = [] if failure else [store.record_file(path) for path in sorted(own + common)]
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, (failure, records))
    failures = [text for text, _ in gathered if text]
    if failures:
        raise CheckpointError(f"{staging}: the checkpoint was not written: " + "; ".join(failures))
    return [record for _, records in gathered for record in records]


def _layout(topology: Topology) -> dict[str, int]:
    return {"tensor": topology.tp_size, "pipeline": topology.pp_size, "data": topology.dp_size}


def _facts(topology: Topology) -> dict[str, Any]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "megatron-core")}
    return {"layout": _layout(topology), "versions": packages}
