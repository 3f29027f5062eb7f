"""Read a run directory as typed records. Only this module knows its file names and keys.

    run.json                 what was run, on what machine, in which stages     -> RunInfo
    timings.jsonl            one line per attempt at a step                     -> StepTime
    <stage folder>/metrics.jsonl   one line per logged training step            -> TrainingRecord
    data/<set>.json          packed data sets (:mod:`megatron_vl.data.dataset.manifest`)
    eval/predictions_{model,blind}.jsonl     (:mod:`megatron_vl.evaluation.predictions`)
    eval/replies.jsonl       of the model after stage 3, in dialogues; the same
    eval/losses/{model,blind}_<stage>.json   by tools/evaluate_loss.py          -> HeldOutLoss
    eval/checks.json         yes-or-no findings                                 -> Check

Everything else (scores, requirements, tables) is computed from these, so no two files of a run can disagree. A
missing or damaged file is a DataError that names it and the step that writes it. Unknown keys are ignored, so that
newer runs stay readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.errors import DataError
from megatron_vl.evaluation.json_records import make_record, read_json, read_json_lines

Model = Literal["model", "blind"]
"""The model that is trained with images and the blind model, as the folders and files of a run call them."""
_EVALUATED = (
    ("model", "stage1"),
    ("blind", "stage1"),
    ("model", "stage2"),
    ("blind", "stage2"),
    ("model", "stage3"),
)
"""Checkpoints whose held-out losses a run has."""


@dataclass(frozen=True)
class TrainingRecord:
    """One logged training step."""

    iteration: int
    lm_loss: float
    learning_rate: float
    grad_norm: float | None
    """None if it was not finite."""
    tokens_per_second: float
    images_per_second: float
    tflops_per_rank: float
    layout: str
    """Parallel sizes as the trainer writes them; equal strings are equal layouts."""


@dataclass(frozen=True)
class StepTime:
    """Wall-clock time of one attempt at a step of the pipeline."""

    step: str
    seconds: float
    began: float
    """Seconds since the epoch; steps may run side by side."""
    finished: bool = True


@dataclass(frozen=True)
class StageInfo:
    """One training stage: the folder of its metrics, and its description."""

    name: str
    """stage0 .. stage3."""
    title: str
    trains: str
    starts_from: str
    folder: str
    """Of the model with images, relative to the run directory."""
    recipe: str
    blind_folder: str | None = None


@dataclass(frozen=True)
class RunInfo:
    """What was run and where."""

    title: str
    profile: str
    command: str
    date: str
    commit: str
    machine: Mapping[str, str]
    """Label to value, in the order in which they are shown."""
    model: Mapping[str, str]
    """The same about the sizes of the model."""
    stages: tuple[StageInfo, ...]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss per supervised token on held-out data."""

    stage: str
    model: Model
    task: str
    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Check:
    """A yes-or-no finding, for example that stage 1 left the language model unchanged."""

    name: str
    passed: bool
    detail: str


def load_run_info(run_dir: Path) -> RunInfo:
    """Read ``run.json``."""
    path = run_dir / "run.json"
    data = read_json(path, written_by="the first step of the quickstart")
    return make_record(RunInfo, data, path, "the run")


def load_timings(run_dir: Path) -> tuple[StepTime, ...]:
    """Read ``timings.jsonl``, one record per attempt, in order."""
    path = run_dir / "timings.jsonl"
    lines = read_json_lines(path, written_by="the quickstart, as each step ends", is_log=True)
    return tuple(make_record(StepTime, line, path, f"line {i}") for i, line in lines.items())


def load_training(folder: Path) -> tuple[TrainingRecord, ...]:
    """Read the training lines of a stage's ``metrics.jsonl`` in order of steps; the later of two lines about a step
    wins.

    A run that was killed and resumed logs the steps since its last checkpoint again. A line about steps that were all
    skipped has no loss.
    """
    path = folder / "metrics.jsonl"
    by_iteration: dict[int, TrainingRecord] = {}
    for i, line in read_json_lines(path, written_by="tools/train.py", is_log=True).items():
        if line.get("lm_loss") is not None:
            record = make_record(TrainingRecord, line, path, f"line {i}")
            by_iteration[record.iteration] = record
    if not by_iteration:
        raise DataError(f"{path}: no line has a training loss (key lm_loss); expected one per logged step")
    return tuple(by_iteration[iteration] for iteration in sorted(by_iteration))


def load_losses(folder: Path) -> tuple[HeldOutLoss, ...]:
    """Read the held-out losses, in the order of stages; a data set is named ``heldout_<task>``."""
    losses = []
    for model, stage in _EVALUATED:
        path = folder / f"{model}_{stage}.json"
        for prefix, entry in read_json(path, written_by="tools/evaluate_loss.py").items():
            task = Path(prefix).name.removeprefix("heldout_")
            values = {**entry, "stage": stage, "model": model, "task": task}
            losses.append(make_record(HeldOutLoss, values, path, prefix))
    return tuple(losses)


def load_checks(path: Path) -> tuple[Check, ...]:
    """Read the list of findings."""
    entries = read_json(path, written_by="the evaluation steps of the quickstart")
    return tuple(make_record(Check, entry, path, f"entry {i}") for i, entry in enumerate(entries))
