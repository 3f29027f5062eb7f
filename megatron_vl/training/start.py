"""Find where a run starts, from its configuration and small files: what ``--check`` refuses without torch.

``--auto-resume`` continues from a checkpoint of ``checkpoint.save``. A checkpoint named by ``--load`` or
``--pretrained-checkpoint`` must be usable; otherwise it is an error. Faults that only the bytes of a checkpoint show
are found when it is loaded (``resume.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.same_model import check_same_model
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.training.state import TrainState


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts with, if it does not start with fresh weights."""

    path: Path
    """A checkpoint, or a directory of them."""
    optimizer: bool
    rng: bool
    progress: bool
    may_fall_back: bool = False
    """Whether the newest undamaged checkpoint may be used; otherwise only the named one."""


def choose_start(config: RunConfig) -> Start | None:
    """Return the checkpoint that the configuration asks to load, None for fresh weights.

    Raises:
        CheckpointError: if the save directory holds checkpoints that this run would not continue.
    """
    checkpoint = config.checkpoint
    root = Path(checkpoint.save) if checkpoint.save else None
    saved = store.steps_named(root) if root else []
    if root and saved and checkpoint.auto_resume:
        return Start(root, optimizer=True, rng=True, progress=True, may_fall_back=True)
    resumes = checkpoint.load is not None and not checkpoint.finetune
    if saved and not resumes:
        raise CheckpointError(
            f"checkpoint.save: {checkpoint.save} already holds checkpoints (newest: step {saved[-1]}), and this run "
            "would start over: add --auto-resume to go on from there, or choose an empty directory"
        )
    if checkpoint.load:
        _check_one_run(Path(checkpoint.load), root, saved)
        return Start(
            Path(checkpoint.load),
            optimizer=resumes and not checkpoint.no_load_optim,
            rng=resumes and not checkpoint.no_load_rng,
            progress=resumes,
        )
    if checkpoint.pretrained_checkpoint:
        return Start(Path(checkpoint.pretrained_checkpoint), optimizer=False, rng=False, progress=False)
    return None


def _check_one_run(load: Path, root: Path | None, saved: list[int]) -> None:
    """Refuse a save directory with checkpoints if the one to load is not among them.

    ``keep_last`` would remove them, and ``auto_resume`` might use them.
    """
    if root and saved and root.resolve() not in (load.resolve(), load.resolve().parent):
        raise CheckpointError(
            f"checkpoint.save: {root} already holds checkpoints (newest: step {saved[-1]}) of another run than "
            f"checkpoint.load {load}: save to an empty directory, or to the one that holds what is loaded; to go on "
            f"from {root}, give --auto-resume and leave --load out"
        )


def check_start(config: RunConfig, data: str) -> None:
    """Refuse what a checkpoint's small files already show: another model, other rows, later checkpoints.

    Args:
        data: fingerprint of the rows of this run.

    Raises:
        CheckpointError: as the run would, after it has started all ranks and built the model.
    """
    start = choose_start(config)
    if start is None:
        return
    try:
        state = _check_checkpoint(start, config)
    except DamagedCheckpointError:
        if start.may_fall_back:  # the run finds the newest one that is whole
            return
        raise
    if start.progress:
        check_nothing_later(check_same_rows(state, data), config)


def _check_checkpoint(start: Start, config: RunConfig) -> TrainState:
    """Refuse a checkpoint of another model. Return the progress of the checkpoint that the run would load."""
    checkpoint = store.resolve(start.path)
    check_same_model(config.model, store.read_config(checkpoint).model, checkpoint)
    try:
        progress = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{checkpoint / 'state.json'}: cannot be read ({error})") from error
    return as_state(progress, checkpoint)


def as_state(progress: dict[str, Any], checkpoint: Path) -> TrainState:
    """Return the progress of a checkpoint as a ``TrainState``.

    Raises:
        CheckpointError: if it has a field that this version does not know.
    """
    try:
        return TrainState(**progress)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(TrainState))
        raise CheckpointError(
            f"{checkpoint / 'state.json'}: written by another version of megatron_vl, which knows more or other things "
            f"than {known} ({error}): go on with that version, or from the weights alone with --pretrained-checkpoint"
        ) from error


def check_nothing_later(state: TrainState, config: RunConfig) -> None:
    """Refuse a save directory with later checkpoints, whose steps this run would reach after hours of training.

    Raises:
        CheckpointError: if there are such checkpoints.
    """
    save = config.checkpoint.save
    later = [step for step in store.steps_named(Path(save)) if step > state.step] if save else []
    if later:
        raise CheckpointError(
            f"checkpoint.save: {save} holds step {later[-1]}, and this run goes on from step {state.step}: remove the "
            "later checkpoints, or save to another directory"
        )


def check_same_rows(state: TrainState, data: str) -> TrainState:
    """Refuse to continue if the rows or their order differ from those in which the data position was counted.

    Raises:
        CheckpointError: if the data sets, their weights or the seed have changed.
    """
    if state.data and state.data != data:
        raise CheckpointError(
            f"data.data_path, its files or training.seed have changed since step {state.step}: rows {state.data} then, "
            f"{data} now. Go on with the same ones, or start from the weights with --pretrained-checkpoint (or --load "
            "with --finetune) and an empty save directory"
        )
    return replace(state, data=data)
