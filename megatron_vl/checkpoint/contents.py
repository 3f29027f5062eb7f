"""Write and read the contents of a checkpoint; all ranks do it together.

Weights and optimizer state go through Megatron-Core's distributed checkpointing. Each tensor is stored under its global
name with its global shape, so any tensor x pipeline x data layout loads what any other has saved. Beside them are the
resolved configuration (``config.yaml``), progress (``state.json``) and each rank's random streams (``rng.pt``). The
streams are restored only on the layout and kind of device that wrote them, since one rank's stream has no meaning on
another rank.

Either supported version of Megatron-Core loads what the other has saved. What is not a tensor is in ``common.pt``:
0.16.1 writes and requires this file, 0.19.2 reads it where it exists, but writes it only among the tensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer
from torch import nn

from megatron_vl import machine_errors
from megatron_vl.checkpoint import optimizer_state, store
from megatron_vl.checkpoint.loading import load_state, reason_of
from megatron_vl.checkpoint.same_model import check_same_model
from megatron_vl.checkpoint.streaming import StreamingStrategy
from megatron_vl.checkpoint.verification import Verified, choose_together
from megatron_vl.config.load import dump_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel import agreement, rng
from megatron_vl.parallel.collectives import max_over_world
from megatron_vl.parallel.topology import Topology

T = TypeVar("T")

_COMMON = "common.pt"
_EXTRA_STATE = "_extra_state"
"""The end of the names under which Transformer Engine keeps bytes of its own. It unpickles such bytes without any
check.

The bytes hold what FP8 remembers of past steps and no weight, so they are neither written nor read.
"""


class ShardedChunk(Protocol):
    """A model chunk that can describe and load its tensors."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


@dataclass(frozen=True)
class Trained:
    """What a checkpoint is made of, on this rank."""

    chunks: Sequence[ShardedChunk]
    optimizer: ChainedOptimizer | None
    strategy: StreamingStrategy | None = None
    """How the tensors are written, if not by Megatron-Core's strategy."""


@dataclass(frozen=True)
class _Agreement:
    """Parts of a save after which every rank knows whether all have succeeded. If not, all raise, with the reason."""

    root: Path
    topology: Topology

    def by_all(self, action: Callable[[], T]) -> list[T]:
        """Run ``action``, which communicates with no other rank, everywhere. Return the results by rank."""

        def attempt() -> tuple[str, Any]:
            try:
                return "", action()
            except (OSError, RuntimeError, CheckpointError) as error:
                return f"rank {self.topology.rank}: {machine_errors.describe(error) or error}", None

        gathered = agreement.by_all(attempt)
        if failures := [text for text, _ in gathered if text]:
            raise CheckpointError(f"{self.root}: the checkpoint was not written: " + "; ".join(failures))
        return [value for _, value in gathered]

    def by_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0, and return its result on every rank."""
        return self.by_all(lambda: action() if self.topology.rank == 0 else None)[0]


def save(trained: Trained, progress: dict[str, Any], *, config: RunConfig, topology: Topology, root: Path) -> Path:
    """Write and commit a checkpoint; every rank calls it.

    Args:
        progress: fields of the training state; ``step`` names the checkpoint.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: if a rank could not write; then nothing was committed.
    """
    agreed = _Agreement(root, topology)
    staging = agreed.by_rank_0(lambda: store.open_staging(root, progress["step"]))
    try:
        return _fill_and_commit(staging, trained, progress, config=config, agreed=agreed)
    except BaseException:  # a tensor that cannot be read, or an interrupt, too
        if topology.rank == 0:
            store.discard(staging)
        raise


def _fill_and_commit(
    staging: Path, trained: Trained, progress: dict[str, Any], *, config: RunConfig, agreed: _Agreement
) -> Path:
    topology, root, step = agreed.topology, agreed.root, progress["step"]
    common = _save_tensors(trained, staging, topology)
    streams = agreed.by_all(rng.state_dict)

    def write_own_files() -> list[store.FileRecord]:
        if topology.rank == 0:
            (staging / store.CONFIG).write_text(dump_config(config))
            (staging / "state.json").write_text(json.dumps(progress, indent=1))
            torch.save(streams, staging / "rng.pt")
            if not (staging / _COMMON).exists():
                torch.save(common, staging / _COMMON)
        known = {record.name: record for record in trained.strategy.records} if trained.strategy else {}
        return [known.get(path.name) or store.record_file(path) for path in _own_files(staging, topology.rank)]

    records = agreed.by_all(write_own_files)
    files = [record for own in records for record in own]
    agreed.by_rank_0(lambda: store.commit(staging, root, step=step, files=files, facts=_facts(topology)))
    return store.directory_of(root, step)


def load(
    trained: Trained, source: Path | Verified, *, config: RunConfig, topology: Topology, load_rng: bool = True
) -> dict[str, Any]:
    """Load a checkpoint into the model, and into the optimizer if one is given; every rank calls it.

    Args:
        source: a checkpoint, or a directory of them (the newest is taken). A path is verified first: every file is
            compared with the manifest.

    Returns:
        The progress that was saved with it.

    Raises:
        CheckpointError: if there is none, a file is not what was written, or it is of another model.
    """
    if not isinstance(source, Verified):
        source = choose_together(source, topology)
    checkpoint = source.path
    agreement.together(lambda: check_same_model(config.model, store.read_config(checkpoint).model, checkpoint))
    _load_tensors(trained, checkpoint)
    if load_rng:
        agreement.together(lambda: _load_streams(checkpoint, topology))
    progress: dict[str, Any] = agreement.together(lambda: json.loads((checkpoint / "state.json").read_text()))
    return progress


def _load_streams(checkpoint: Path, topology: Topology) -> None:
    """Restore the random streams of this rank if layout and kind of device are those that wrote them."""
    written = store.read_manifest(checkpoint)["layout"]
    if {"device": "cpu"} | written == _layout(topology):  # older ones do not name the device
        streams = torch.load(checkpoint / "rng.pt", weights_only=True)
        rng.load_state_dict(streams[topology.rank])


def _model(trained: Trained) -> dict[str, Any]:
    model: dict[str, Any] = {}
    for chunk in trained.chunks:
        described = chunk.sharded_state_dict()
        model.update({name: value for name, value in described.items() if not name.endswith(_EXTRA_STATE)})
    return model


def _tensors(trained: Trained, topology: Topology) -> dict[str, Any]:
    state: dict[str, Any] = {"model": _model(trained)}
    if trained.optimizer is not None:
        step = max_over_world(optimizer_state.own_step(trained.optimizer), device=topology.device)
        state["optimizer"] = optimizer_state.describe(trained.optimizer, state["model"], step=round(step))
    return state


def _save_tensors(trained: Trained, staging: Path, topology: Topology) -> dict[str, Any]:
    """Write the tensors. Return what is not a tensor."""
    # It derives from BaseException, so it must be caught by name.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        state = _tensors(trained, topology)
        common = {"optimizer": {"param_groups": state["optimizer"]["param_groups"]}} if "optimizer" in state else {}
        dist_checkpointing.save(state, str(staging), trained.strategy)
    except CheckpointException as error:
        raise CheckpointError(f"{staging.parent}: the checkpoint was not written: {reason_of(error)}") from error
    except (OSError, RuntimeError) as error:
        told = f"rank {topology.rank}: {machine_errors.describe(error) or error}"
        raise CheckpointError(f"{staging.parent}: the checkpoint was not written: {told}") from error
    return common


def _load_tensors(trained: Trained, checkpoint: Path) -> None:
    model = _model(trained)
    try:
        if trained.optimizer is not None:
            optimizer_state.use_masters(model, checkpoint)
        loaded = load_state({"model": model}, checkpoint)
        for chunk in trained.chunks:
            assert isinstance(chunk, nn.Module)
            names = chunk.state_dict().keys()
            # Modules with an extra state require its name in the dictionary, and accept None as its value.
            chunk.load_state_dict(
                {name: None if name.endswith(_EXTRA_STATE) else loaded["model"][name] for name in names}
            )
        if trained.optimizer is not None:
            optimizer_state.load(trained.optimizer, _model(trained), checkpoint)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be loaded: {error}") from error


def _own_files(staging: Path, rank: int) -> list[Path]:
    """Return the files that a rank has written; for rank 0 also the files that belong to all ranks."""
    own = [path for path in staging.iterdir() if path.name.startswith(f"__{rank}_")]
    common = [path for path in staging.iterdir() if not path.name.startswith("__")] if rank == 0 else []
    return sorted(own + common)


def _layout(topology: Topology) -> dict[str, int | str]:
    """Return what random streams belong to. The states of a CPU and of a GPU have different forms."""
    sizes = {"tensor": topology.tp_size, "pipeline": topology.pp_size, "data": topology.dp_size}
    return {**sizes, "device": topology.device.type}


def _facts(topology: Topology) -> dict[str, Any]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "megatron-core")}
    return {"layout": _layout(topology), "versions": packages}
