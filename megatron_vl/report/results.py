"""Write the results of a run as files to keep: JSON for programs, Markdown for people, with date and commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vl.files import write_whole
from megatron_vl.report.report import Report
from megatron_vl.report.tables import show_duration


def write_results(report: Report, stem: Path) -> None:
    """Write ``STEM.json`` and ``STEM.md``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results_json(report), indent=1, ensure_ascii=False) + "\n"
    write_whole(stem.with_suffix(".json"), text)
    write_whole(stem.with_suffix(".md"), results_markdown(report))


def results_json(report: Report) -> dict[str, Any]:
    """Return the findings, without images and curves."""
    run = report.run
    return {
        "title": run.title,
        "profile": run.profile,
        "command": run.command,
        "date": run.date,
        "commit": run.commit,
        "machine": dict(run.machine),
        "model": dict(run.model),
        "requirements": [asdict(item) for item in report.requirements],
        "scores": [asdict(row) for row in report.scores],
        "heldout_losses": [asdict(row) for row in report.losses],
        "layouts": [asdict(row) for row in report.layouts],
        "seconds": {row.step: round(row.seconds, 1) for row in report.times},
        "total_seconds": round(report.seconds, 1),
    }


def results_markdown(report: Report) -> str:
    """Return the same as a Markdown page."""
    run = report.run
    machine = "; ".join(f"{name}: {value}" for name, value in run.machine.items())
    requirements = [
        (item.what, item.required, item.found, "met" if item.met else "missed") for item in report.requirements
    ]
    scores = [
        (row.task, row.metric, row.with_images, row.without_images, str(row.num_samples)) for row in report.scores
    ]
    losses = [(row.stage, row.task, row.with_images, row.without_images) for row in report.losses]
    steps = [(curve.info.title, str(curve.num_steps), " → ".join(curve.layouts)) for curve in report.curves]
    times = [(row.step, show_duration(row.seconds)) for row in report.times]
    sections = [
        f"# {run.title}",
        f"{run.date}, commit {run.commit}. `{run.command}`: {show_duration(report.seconds)} in all, "
        f"{report.num_met} of {len(report.requirements)} requirements met.",
        machine,
        "The language model is not Qwen-7B but a tiny one, pre-trained on text alone (stage 0). The blind model "
        "was trained and tested with every picture blanked.",
        _table(("Requirement", "required", "found", ""), requirements),
        *(f"Not required, and not reached: {remark}" for remark in report.remarks),
        _table(("Held-out task", "measured by", "this model", "blind model", "samples"), scores),
        _table(("Held-out loss after stage", "task", "this model", "blind model"), losses),
        _table(("Stage", "steps", "layouts"), steps),
        _table(("Step", "time"), times),
    ]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
