"""What lies in a run directory, as typed records: the only place that knows its file names and keys.

    run.json                 what was run, on what machine, in which stages     -> RunInfo
    timings.jsonl            one line per attempt at a step                     -> StepTime
    <stage folder>/metrics.jsonl   one line per logged training step            -> TrainingRecord
    data/<set>.json          packed data sets (:mod:`megatron_vl.data.dataset.manifest`)
    eval/predictions_{sighted,blind}.jsonl                                      -> Prediction
    eval/replies.jsonl       of the model after stage 3, in dialogues           -> Prediction
    eval/losses.json         held-out losses                                    -> HeldOutLoss
    eval/checks.json         yes-or-no findings                                 -> Check

Everything else (scores, bars, tables) is computed from these, so no two files of a run can disagree. A
missing or damaged file is a DataError that names it and says which step writes it; unknown keys are ignored,
so that newer runs stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from megatron_vl.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Model = Literal["sighted", "blind"]
T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Prediction:
    """One question, its true answer and what the model wrote."""

    key: str
    task: str
    prompt: str
    references: tuple[str, ...]
    """The true answer, or several that are equally right, in the model's own markup."""
    prediction: str
    image: Path | None = None
    annotators: tuple[str, ...] = ()
    """VQA: what each annotator answered, two or more; the references are then not scored against."""


@dataclass(frozen=True)
class TrainingRecord:
    """One logged training step."""

    iteration: int
    lm_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    images_per_second: float
    tflops_per_rank: float
    layout: str
    """Parallel sizes as the trainer writes them; equal strings are equal layouts."""


@dataclass(frozen=True)
class StepTime:
    """Wall-clock time that one attempt at a step of the pipeline took."""

    step: str
    seconds: float
    began: float
    """Seconds since the epoch; steps may run side by side."""
    finished: bool = True


@dataclass(frozen=True)
class StageInfo:
    """One training stage: where its metrics lie and how to describe it."""

    name: str
    """stage0 .. stage3."""
    title: str
    trains: str
    starts_from: str
    folder: str
    """Of the sighted model, relative to the run directory."""
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
    """Mean loss of a supervised token on held-out data."""

    stage: str
    model: Model
    task: str
    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Check:
    """A yes-or-no finding, such as that stage 1 left the language model as it was."""

    name: str
    passed: bool
    detail: str


def load_run_info(run_dir: Path) -> RunInfo:
    """Read ``run.json``."""
    path = run_dir / "run.json"
    data = _read_json(path, written_by="the first step of the quickstart")
    stages = tuple(_record(StageInfo, stage, path, f"stages[{i}]") for i, stage in enumerate(data.get("stages", ())))
    return _record(RunInfo, {**data, "stages": stages}, path, "the run")


def load_timings(run_dir: Path) -> tuple[StepTime, ...]:
    """Read ``timings.jsonl``, one record per attempt, in order."""
    path = run_dir / "timings.jsonl"
    lines = _read_jsonl(path, written_by="the quickstart, as each step ends")
    return tuple(_record(StepTime, line, path, f"line {i}") for i, line in enumerate(lines, 1))


def load_training(folder: Path) -> tuple[TrainingRecord, ...]:
    """Read a stage's ``metrics.jsonl``: training lines in order of steps, the later of two lines about a
    step.

    (A run that was killed and resumed logs the steps since its last checkpoint again. A line about steps that were all
    skipped has no loss.)
    """
    path = folder / "metrics.jsonl"
    by_iteration: dict[int, TrainingRecord] = {}
    for i, line in enumerate(_read_jsonl(path, written_by="tools/train.py"), 1):
        if line.get("lm_loss") is not None:
            record = _record(TrainingRecord, line, path, f"line {i}")
            by_iteration[record.iteration] = record
    if not by_iteration:
        raise DataError(f"{path}: no line has a training loss (key lm_loss); expected one per logged step")
    return tuple(by_iteration[iteration] for iteration in sorted(by_iteration))


def load_predictions(path: Path) -> tuple[Prediction, ...]:
    """Read the output of ``tools/generate.py``; image paths may be relative to the file's folder."""
    predictions = []
    for i, line in enumerate(_read_jsonl(path, written_by="tools/generate.py"), 1):
        if line.get("prediction") is None and "skipped" in line:
            raise DataError(
                f"{path}, line {i}: was not answered ({line['skipped']}), so there is no score of the whole file; mend "
                "or remove the question and generate again"
            )
        image = line.get("image")
        values = {
            **line,
            "references": _references(line, f"{path}, line {i}"),
            "image": None if image is None else path.parent / image,
            "annotators": _annotators(line, f"{path}, line {i}"),
        }
        predictions.append(_record(Prediction, values, path, f"line {i}"))
    return tuple(predictions)


def _references(line: dict[str, Any], where: str) -> tuple[str, ...]:
    found = line.get("reference")
    references = found if isinstance(found, list) else [found]
    if not references or not all(isinstance(answer, str) for answer in references):
        raise DataError(f"{where}: 'reference' is {found!r:.80}; expected the true answer, or a list of true answers")
    return tuple(references)


def _annotators(line: dict[str, Any], where: str) -> tuple[str, ...]:
    found = line.get("annotators", [])
    if not isinstance(found, list) or len(found) == 1 or not all(isinstance(answer, str) for answer in found):
        raise DataError(f"{where}: 'annotators' is {found!r}; expected a list of two or more texts, or nothing")
    return tuple(found)


def load_losses(path: Path) -> tuple[HeldOutLoss, ...]:
    """Read the list of held-out losses."""
    entries = _read_json(path, written_by="the evaluation steps of the quickstart")
    return tuple(_record(HeldOutLoss, entry, path, f"entry {i}") for i, entry in enumerate(entries))


def load_checks(path: Path) -> tuple[Check, ...]:
    """Read the list of findings."""
    entries = _read_json(path, written_by="the evaluation steps of the quickstart")
    return tuple(_record(Check, entry, path, f"entry {i}") for i, entry in enumerate(entries))


def _record(kind: type[T], values: Any, path: Path, where: str) -> T:
    """Make a record of the values that it knows; a missing value is an error that says where."""
    if not isinstance(values, dict):
        raise DataError(f"{path}, {where}: found {type(values).__name__}, expected an object")
    names = {field.name for field in fields(kind)}
    try:
        return kind(**{key: value for key, value in values.items() if key in names})
    except TypeError as error:
        raise DataError(f"{path}, {where}: {error}; found the keys {', '.join(sorted(values))}") from None


def _read_text(path: Path, written_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it is written by {written_by}") from None


def _read_json(path: Path, *, written_by: str) -> Any:
    try:
        return json.loads(_read_text(path, written_by))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); it is written by {written_by}, run that again") from None


def _read_jsonl(path: Path, *, written_by: str) -> list[dict[str, Any]]:
    """Parse JSON lines; a torn last line (a killed writer) is left out, any other damage is an error."""
    lines = _read_text(path, written_by).split("\n")
    records = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i == len(lines):
                break
            raise DataError(f"{path}, line {i}: not JSON ({error}); it is written by {written_by}") from None
    return records
