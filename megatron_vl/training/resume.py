"""Find and load the checkpoint from which a run continues; all ranks do it together.

``start.py`` reads what the configuration asks for. ``--auto-resume`` continues from the newest undamaged checkpoint of
``checkpoint.save``. Newer checkpoints that are damaged are renamed, since a run that reaches their step again must be
able to save it; nothing of them is removed. Rank 0 reads directories for all ranks. Otherwise ranks that see the
changes of a shared disk at different moments might decide differently.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vl import folder_lock
from megatron_vl.checkpoint import contents, store
from megatron_vl.checkpoint.verification import Verified, choose_together, verify_together
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, DamagedCheckpointError, FolderInUseError
from megatron_vl.log import log_rank_0
from megatron_vl.parallel.agreement import by_all, by_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.parameters import model_tensors, trains
from megatron_vl.training import not_finite
from megatron_vl.training.parallel_model import ParallelModel
from megatron_vl.training.start import Start, as_state, choose_start
from megatron_vl.training.state import TrainState


@dataclass(frozen=True)
class VerifiedStart:
    """The start of a run, and its checkpoint, which all ranks have verified."""

    start: Start
    checkpoint: Verified


def find_start(config: RunConfig, topology: Topology) -> VerifiedStart | None:
    """Find the checkpoint to load, the same on all ranks, and verify it.

    Raises:
        CheckpointError: under the conditions of :func:`megatron_vl.training.start.choose_start`, or if the checkpoint
            is damaged.
    """
    start: Start | None = by_rank_0(lambda: choose_start(config))
    if start is None:
        return None
    if not start.may_fall_back:
        return VerifiedStart(start, _named(start.path, topology))
    steps: list[int] = by_rank_0(lambda: store.steps_named(start.path))
    return VerifiedStart(start, _newest_whole(start.path, steps, topology))


@contextmanager
def hold_save_directory(config: RunConfig) -> Iterator[None]:
    """Create the save directory and hold its lock on rank 0, so that no second training writes to it.

    Raises:
        CheckpointError: on all ranks, if another training holds the lock, if the directory cannot be created or
            written to, or if some ranks do not see it.
    """
    save = config.checkpoint.save
    with ExitStack() as held:
        if save:
            by_rank_0(lambda: _hold(Path(save), held))
            _check_seen_by_all(Path(save))
        yield


def _hold(root: Path, held: ExitStack) -> None:
    try:
        held.enter_context(folder_lock.hold(root, store.LOCK))
    except FolderInUseError as holder:
        raise CheckpointError(
            f"checkpoint.save: another training saves to {root} ({holder}): wait for it, end it, or choose another "
            "directory"
        ) from holder
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.save: {error.filename or root} cannot be written to ({error.strerror or error}): choose "
            "another directory, or mend its rights or its room"
        ) from error


def _check_seen_by_all(root: Path) -> None:
    """Refuse a directory that is a different one on another machine: the first save would fail, after hours.

    The test file has a new name, so no machine can have cached that it is absent.
    """
    mark: str = by_rank_0(lambda: _leave_mark(root))
    seen = by_all((root / mark).is_file)
    by_rank_0(lambda: (root / mark).unlink(missing_ok=True))
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        named = ", ".join(map(str, blind[:8])) + (", ..." if len(blind) > 8 else "")
        raise CheckpointError(
            f"checkpoint.save: {root} is not the same directory to ranks {named} as to rank 0: every rank writes a "
            "part of a checkpoint, so give a directory of a file system that all machines share"
        )


def _leave_mark(root: Path) -> str:
    mark = root / f".seen-{uuid.uuid4().hex[:8]}"
    mark.touch()
    return mark.name


def load_start(found: VerifiedStart, model: ParallelModel, *, config: RunConfig, topology: Topology) -> TrainState:
    """Load the checkpoint into the model and its optimizer. Return the progress from which the run continues."""
    start, checkpoint = found.start, found.checkpoint
    trained = contents.Trained(model.chunks, model.optimizer if start.optimizer else None)
    progress = contents.load(trained, checkpoint, config=config, topology=topology, load_rng=start.rng)
    if not start.optimizer:
        # The optimizer keeps fp32 copies of the weights, made when it was built.
        model.optimizer.reload_model_params()
    else:
        _warn_of_dropped_moments(config, checkpoint.path)
    not_finite.check_loaded(model, topology, checkpoint.path)
    log_rank_0(f"loaded {checkpoint.path}" + ("" if start.progress else " (weights only)"))
    return as_state(progress, checkpoint.path) if start.progress else TrainState()


def _warn_of_dropped_moments(config: RunConfig, checkpoint: Path) -> None:
    """Warn if parts trained before that are frozen now: a checkpoint has moments only of what trains."""
    before, now = FrozenParts.of(store.read_config(checkpoint).training), FrozenParts.of(config.training)
    frozen = [spec for spec in model_tensors(config.model) if trains(spec.name, before) and not trains(spec.name, now)]
    if frozen:
        parts = ", ".join(dict.fromkeys(spec.part for spec in frozen))
        log_rank_0(
            f"MOMENTS DROPPED: {len(frozen)} tensors of {parts} trained before {checkpoint} and are frozen now. The "
            "checkpoints of this run will have no moments for them; a run that trains them again starts from weights "
            "alone, with --no-load-optim, or goes on from this checkpoint",
            level=logging.WARNING,
        )


def _newest_whole(root: Path, steps: list[int], topology: Topology) -> Verified:
    """Return the newest undamaged checkpoint, after renaming newer damaged ones.

    Raises:
        CheckpointError: if all are damaged, or if one cannot be read. The latter is no reason to use an older one.
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
        if not damaged:
            store.warn_of_tracker(root, step)
        return verified
    reasons = "; ".join(reason for _, reason in damaged)
    raise CheckpointError(
        f"checkpoint.save: no checkpoint in {root} is whole, and nothing was changed: {reasons}. Put a good copy back, "
        "or move them away to start over"
    )


def _set_aside(path: Path, reason: str, *, goes_on_from: int) -> None:
    """Rename a damaged checkpoint, and report it."""
    renamed = by_rank_0(lambda: store.set_aside(path))
    log_rank_0(
        f"DAMAGED CHECKPOINT {path}: {reason}. It is now {renamed}, for you to look at or remove; this run goes on "
        f"from step {goes_on_from} and does the steps after it again",
        level=logging.WARNING,
    )


def _named(path: Path, topology: Topology) -> Verified:
    """Return the checkpoint at a path, verified.

    Raises:
        CheckpointError: if it is absent or damaged; the message names others in the same directory.
    """
    try:
        return choose_together(path, topology)
    except DamagedCheckpointError as error:
        checkpoint: Path = by_rank_0(lambda: store.resolve(path))
        steps = store.steps_in(checkpoint.parent)
        others = [str(store.directory_of(checkpoint.parent, step)) for step in steps]
        beside = [other for other in others if other != str(checkpoint)]
        remedy = f"name another one, such as {beside[-1]}" if beside else "there is no other one beside it"
        raise CheckpointError(f"{error}. Nothing else was loaded in its place: {remedy}") from error
