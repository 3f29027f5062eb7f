"""Where a run starts: which checkpoint it goes on from, and what is refused.

``--auto-resume`` goes on from the newest checkpoint of ``checkpoint.save`` that is whole. Newer ones that are damaged
are renamed, since a run that comes to their step again must be able to save it; nothing of them is removed. A
checkpoint that is named, with ``--load`` or ``--pretrained-checkpoint``, is either that one or an error. Rank 0 looks
at directories for all ranks, so that those which see a shared disk at different moments decide alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_vl.checkpoint import contents, store
from megatron_vl.checkpoint.verification import Verified, verify_together
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.log import log_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.training import not_finite
from megatron_vl.training.parallel_model import ParallelModel
from megatron_vl.training.state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a run's weights come from, and what comes with them."""

    checkpoint: Verified
    optimizer: bool
    rng: bool
    progress: bool


def choose_source(config: RunConfig, topology: Topology) -> Source | None:
    """Decide what to load, the same on all ranks; refuse to start over in a directory that holds checkpoints.

    Raises:
        CheckpointError: the save directory holds checkpoints that this run would not continue, or what is to be loaded
            is absent or damaged.
    """
    checkpoint = config.checkpoint
    root = Path(checkpoint.save) if checkpoint.save else None
    saved = _on_rank_0(lambda: store.steps_named(root) if root else [])
    if root and saved and checkpoint.auto_resume:
        return Source(_newest_whole(root, saved, topology), optimizer=True, rng=True, progress=True)
    resumes = checkpoint.load is not None and not checkpoint.finetune
    if saved and not resumes:
        raise CheckpointError(
            f"checkpoint.save: {checkpoint.save} already holds checkpoints (newest: step {saved[-1]}), and this run "
            "would start over: add --auto-resume to go on from there, or choose an empty directory"
        )
    if checkpoint.load:
        return Source(
            _named(Path(checkpoint.load), topology),
            optimizer=resumes and not checkpoint.no_load_optim,
            rng=resumes and not checkpoint.no_load_rng,
            progress=resumes,
        )
    if checkpoint.pretrained_checkpoint:
        named = _named(Path(checkpoint.pretrained_checkpoint), topology)
        return Source(named, optimizer=False, rng=False, progress=False)
    return None


def load_source(source: Source, model: ParallelModel, *, config: RunConfig, topology: Topology) -> TrainState:
    """Load what a source says into the model and its optimizer; where the run stands then."""
    trained = contents.Trained(model.chunks, model.optimizer if source.optimizer else None)
    progress = contents.load(trained, source.checkpoint, config=config, topology=topology, load_rng=source.rng)
    if not source.optimizer:
        # The optimizer keeps fp32 copies of the weights, made when it was built.
        model.optimizer.reload_model_params()
    not_finite.check_loaded(model, topology, source.checkpoint.path)
    log_rank_0(f"loaded {source.checkpoint.path}" + ("" if source.progress else " (weights only)"))
    return TrainState(**progress) if source.progress else TrainState()


def check_nothing_later(state: TrainState, config: RunConfig) -> None:
    """Refuse a save directory whose later checkpoints this run would come upon after hours of training.

    Raises:
        CheckpointError: there are such checkpoints.
    """
    save = config.checkpoint.save
    later = [step for step in store.steps_named(Path(save)) if step > state.step] if save else []
    if later:
        raise CheckpointError(
            f"checkpoint.save: {save} holds step {later[-1]}, and this run goes on from step {state.step}: remove the "
            "later checkpoints, or save to another directory"
        )


def check_same_rows(state: TrainState, data: str) -> TrainState:
    """Refuse to go on with other rows, or in another order, than the position in the data was counted in.

    Raises:
        CheckpointError: the data sets, their weights or the seed have changed.
    """
    if state.data and state.data != data:
        raise CheckpointError(
            f"data.data_path, its files or training.seed have changed since step {state.step}: rows {state.data} then, "
            f"{data} now. Go on with the same ones, or start from the weights with --pretrained-checkpoint (or --load "
            "with --finetune) and an empty save directory"
        )
    return replace(state, data=data)


def _newest_whole(root: Path, steps: list[int], topology: Topology) -> Verified:
    """The newest checkpoint that is whole, after renaming the damaged ones that are newer.

    Raises:
        CheckpointError: none is whole, or one cannot be read, which is no reason to go back behind it.
    """
    damaged: list[tuple[Path, str]] = []
    for step in reversed(steps):
        path = store.directory_of(root, step)
        try:
            verified = verify_together(path, topology)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))
            continue
        for other, reason in damaged:
            _set_aside(other, reason, goes_on_from=step)
        _warn_of_lost(root, steps[-1])
        return verified
    reasons = "; ".join(reason for _, reason in damaged)
    raise CheckpointError(
        f"checkpoint.save: no checkpoint in {root} is whole, and nothing was changed: {reasons}. Put a good copy back, "
        "or move them away to start over"
    )


def _set_aside(path: Path, reason: str, *, goes_on_from: int) -> None:
    """Give a damaged checkpoint another name, and say so."""
    renamed = _on_rank_0(lambda: store.set_aside(path))
    log_rank_0(
        f"DAMAGED CHECKPOINT {path}: {reason}. It is now {renamed}, for you to look at or remove; this run goes on "
        f"from step {goes_on_from} and does the steps after it again",
        level=logging.WARNING,
    )


def _warn_of_lost(root: Path, newest: int) -> None:
    """Say so if the newest checkpoint, by the tracker, has vanished altogether."""
    hinted = store.read_tracker(root)
    if hinted is not None and hinted > newest:
        log_rank_0(
            f"LOST CHECKPOINT: {root / store.TRACKER} names step {hinted}, which is not there; newest is step {newest}",
            level=logging.WARNING,
        )


def _named(path: Path, topology: Topology) -> Verified:
    """The checkpoint that a path means, whole.

    Raises:
        CheckpointError: it is absent or damaged; the message names others that lie beside it.
    """
    checkpoint: Path = _on_rank_0(lambda: store.resolve(path))
    try:
        return verify_together(checkpoint, topology)
    except DamagedCheckpointError as error:
        steps = store.steps_in(checkpoint.parent)
        others = [str(store.directory_of(checkpoint.parent, step)) for step in steps]
        beside = [other for other in others if other != str(checkpoint)]
        remedy = f"name another one, such as {beside[-1]}" if beside else "there is no other one beside it"
        raise CheckpointError(f"{error}. Nothing else was loaded in its place: {remedy}") from error


def _on_rank_0(action: Callable[[], T]) -> T:
    """What an action gives on rank 0, on all ranks; they all fail if it does.

    Raises:
        CheckpointError: it has failed.
    """
    outcome: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (CheckpointError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise CheckpointError(outcome[1])
    value: T = outcome[0]
    return value
