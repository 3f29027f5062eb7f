"""The report of a run: one self-contained ``report.html``, and the same findings as plain text for the terminal.

A report is a pure function of the run directory (:mod:`megatron_vl.report.records`). The page loads nothing: plots are
inline SVG, images are data URIs, the style sheet is in it, and there is no script. Links lead to the pages of its data
sets. The template engine escapes every text of the run; only our own SVG is inserted unescaped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from megatron_vl.errors import DataError
from megatron_vl.evaluation.questions import Prediction, read_predictions
from megatron_vl.evaluation.scoring import SCORERS, Score, score_predictions
from megatron_vl.report.examples import ExampleCard, make_examples
from megatron_vl.report.figures import loss_figure
from megatron_vl.report.html_pages import page_environment
from megatron_vl.report.records import (
    HeldOutLoss,
    Model,
    RunInfo,
    StageInfo,
    load_checks,
    load_losses,
    load_run_info,
    load_timings,
    load_training,
)
from megatron_vl.report.requirements import Findings, Requirement, find_loss, judge
from megatron_vl.report.tables import (
    DataRow,
    LayoutRow,
    TimeRow,
    data_row,
    format_table,
    layout_rows,
    show_duration,
    time_rows,
    total_seconds,
)

EXAMPLES_PER_TASK = 8
EXAMPLE_TASKS = ("referring", "caption", "vqa", "ocr")


@dataclass(frozen=True)
class StageCurve:
    """A stage with the plot of its training loss."""

    info: StageInfo
    figure: str
    """An <svg> element."""
    num_steps: int
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class ScoreRow:
    """A task's score beside the blind model's."""

    task: str
    metric: str
    with_images: str
    without_images: str
    above: str
    """yes, no, or a dash where one was not measured."""
    num_samples: int


@dataclass(frozen=True)
class LossRow:
    """A held-out loss beside the blind model's."""

    stage: str
    task: str
    with_images: str
    without_images: str
    below: str
    """yes, no, or a dash where one was not measured."""


@dataclass(frozen=True)
class Report:
    """Everything that the page and the terminal show."""

    run: RunInfo
    requirements: tuple[Requirement, ...]
    scores: tuple[ScoreRow, ...]
    losses: tuple[LossRow, ...]
    curves: tuple[StageCurve, ...]
    layouts: tuple[LayoutRow, ...]
    examples: Mapping[str, tuple[ExampleCard, ...]]
    data: tuple[DataRow, ...]
    times: tuple[TimeRow, ...]
    seconds: float
    """Time in which at least one step ran."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Scores without a requirement that are not higher with pictures than without."""
        return tuple(
            f"the score on {row.task} ({row.metric}) is {row.with_images}, "
            f"that of the blind model {row.without_images}."
            for row in self.scores
            if row.above == "no"
        )

    @property
    def num_met(self) -> int:
        """Number of requirements that were met."""
        return sum(item.met for item in self.requirements)


def read_report(run_dir: Path) -> Report:
    """Compute a report from the run directory. Raises DataError for a file that is missing or damaged."""
    run = load_run_info(run_dir)
    timings = load_timings(run_dir)
    predictions = _read_predictions(run_dir)
    scores = {model: score_predictions(found) for model, found in predictions.items()}
    losses = load_losses(run_dir / "eval" / "losses")
    checks = load_checks(run_dir / "eval" / "checks.json")
    return Report(
        run=run,
        requirements=judge(run.profile, Findings(scores, losses, checks)),
        scores=_score_rows(scores),
        losses=_loss_rows(losses),
        curves=tuple(_stage_curve(run_dir, stage) for stage in run.stages),
        layouts=tuple(row for stage in run.stages for row in _stage_layouts(run_dir, stage)),
        examples=_examples(predictions) | _replies(run_dir),
        data=tuple(data_row(path.with_suffix("")) for path in _manifest_paths(run_dir)),
        times=time_rows(timings),
        seconds=total_seconds(timings),
    )


def render_page(report: Report, folder: Path) -> str:
    """Return the report as one HTML page, whose links are relative to ``folder``."""
    environment = page_environment("megatron_vl.report")
    environment.filters["duration"] = show_duration
    environment.filters["link"] = lambda path: quote(os.path.relpath(path, folder))
    return environment.get_template("report.html.j2").render(report=report, tasks=SCORERS)


def render_text(report: Report) -> str:
    """Return the requirements, scores, layouts and times as plain text tables."""
    tables = [
        ("Requirements", ("what", "required", "found", ""), _requirement_cells(report.requirements)),
        (
            "Scores on held-out data",
            ("task", "measured by", "this model", "blind model", "samples"),
            _cells(report),
        ),
        ("Layouts", ("stage", "layout", "steps", "tokens/s", "images/s"), _layout_cells(report.layouts)),
        ("Time of each step", ("step", "time", ""), _time_cells(report.times)),
    ]
    parts = [f"{title}\n{format_table(header, rows)}" for title, header, rows in tables if rows]
    if report.run.profile == "smoke":
        parts.append("A smoke test trains a few steps only: it shows that everything runs, and learns nothing.")
    parts += [f"Not required, and not reached: {remark}" for remark in report.remarks]
    total = f"{report.num_met} of {len(report.requirements)} requirements met; {show_duration(report.seconds)} in all"
    return "\n\n".join([*parts, total])


def _manifest_paths(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "data").glob("*.json"))


def _read_predictions(run_dir: Path) -> dict[Model, tuple[Prediction, ...]]:
    folder = run_dir / "eval"
    models: tuple[Model, ...] = ("model", "blind")
    predictions = {model: read_predictions(folder / f"predictions_{model}.jsonl") for model in models}
    _check_questions(folder, predictions)
    return predictions


def _check_questions(folder: Path, predictions: Mapping[Model, Sequence[Prediction]]) -> None:
    """Check that both models have answered the same questions, each once, since their scores are compared."""
    asked = {
        model: Counter((item.key, item.task, item.text, item.references, item.annotators) for item in found)
        for model, found in predictions.items()
    }
    every = [question for questions in asked.values() for question in questions]
    for model, questions in asked.items():
        repeated = [f"{key} is answered more than once" for (key, *_), count in questions.items() if count > 1]
        missing = [f"{question[0]} is not answered" for question in every if question not in questions]
        if wrong := [*repeated, *missing]:
            raise DataError(
                f"{folder / f'predictions_{model}.jsonl'}: {len(wrong)} questions are not answered once as by the "
                f"other model, the first: {wrong[0]}. Generate both files again, from the same questions"
            )


def _score_rows(scores: Mapping[Model, Mapping[str, Score]]) -> tuple[ScoreRow, ...]:
    rows = []
    for task in SCORERS:
        with_images, without_images = scores["model"].get(task), scores["blind"].get(task)
        if with_images is not None:
            above = "–" if without_images is None else "yes" if with_images.value > without_images.value else "no"
            shown = _percent(with_images), _percent(without_images)
            rows.append(ScoreRow(task, with_images.metric, *shown, above, with_images.num_samples))
    return tuple(rows)


def _percent(score: Score | None) -> str:
    return "–" if score is None else f"{100 * score.value:.1f}\u00a0%"


def _loss_rows(losses: Sequence[HeldOutLoss]) -> tuple[LossRow, ...]:
    rows = []
    for stage, task in dict.fromkeys((loss.stage, loss.task) for loss in losses):
        with_images, without_images = (find_loss(losses, stage, model, task) for model in ("model", "blind"))
        below = "–"
        if with_images is not None and without_images is not None:
            below = "yes" if with_images < without_images else "no"
        rows.append(LossRow(stage.removeprefix("stage"), task, _loss(with_images), _loss(without_images), below))
    return tuple(rows)


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _stage_curve(run_dir: Path, stage: StageInfo) -> StageCurve:
    with_images = load_training(run_dir / stage.folder)
    without_images = load_training(run_dir / stage.blind_folder) if stage.blind_folder else ()
    layouts = tuple(dict.fromkeys(row.layout for row in layout_rows(stage.name, with_images)))
    return StageCurve(stage, loss_figure(with_images, without_images), with_images[-1].iteration, layouts)


def _stage_layouts(run_dir: Path, stage: StageInfo) -> tuple[LayoutRow, ...]:
    name = stage.name.removeprefix("stage")
    rows = layout_rows(name, load_training(run_dir / stage.folder))
    if stage.blind_folder:
        rows += layout_rows(f"{name}, blind", load_training(run_dir / stage.blind_folder))
    return rows


def _examples(predictions: Mapping[Model, Sequence[Prediction]]) -> dict[str, tuple[ExampleCard, ...]]:
    without_images = {prediction.key: prediction for prediction in predictions["blind"]}
    found = {
        task: make_examples(predictions["model"], without_images=without_images, task=task, count=EXAMPLES_PER_TASK)
        for task in EXAMPLE_TASKS
    }
    return {task: cards for task, cards in found.items() if cards}


def _replies(run_dir: Path) -> dict[str, tuple[ExampleCard, ...]]:
    """Return the dialogues of the model after stage 3; none in a run of a version without dialogues."""
    path = run_dir / "eval" / "replies.jsonl"
    replies = read_predictions(path) if path.exists() else ()
    cards = make_examples(replies, without_images={}, task="chat", count=EXAMPLES_PER_TASK)
    return {"chat": cards} if cards else {}


def _requirement_cells(requirements: Sequence[Requirement]) -> list[tuple[str, ...]]:
    return [(item.what, item.required, item.found, "met" if item.met else "MISSED") for item in requirements]


def _cells(report: Report) -> list[tuple[str, ...]]:
    return [(row.task, row.metric, row.with_images, row.without_images, str(row.num_samples)) for row in report.scores]


def _layout_cells(rows: Sequence[LayoutRow]) -> list[tuple[str, ...]]:
    return [
        (
            row.stage,
            row.layout,
            f"{row.first}-{row.last}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.images_per_second:,.1f}",
        )
        for row in rows
    ]


def _time_cells(rows: Sequence[TimeRow]) -> list[tuple[str, ...]]:
    return [(row.step, show_duration(row.seconds), "" if row.finished else "unfinished") for row in rows]
