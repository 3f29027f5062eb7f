"""Gather the results of the steps into the files that the report reads, and record what was run on what machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_vl.cli.quickstart.plan import EVALUATIONS, PRESET, STAGES, Plan
from megatron_vl.config.presets import PRESETS
from megatron_vl.files import write_whole
from megatron_vl.planning.parameters import count_parameters
from megatron_vl.report.records import HeldOutLoss, RunInfo


def write_run_info(plan: Plan, command: str) -> None:
    """Write ``run.json``; a resumed run keeps the date of its start."""
    path = plan.run_dir / "run.json"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    date = json.loads(path.read_text(encoding="utf-8")).get("date", now) if path.exists() else now
    info = RunInfo(
        title=plan.profile.title,
        profile=plan.profile.name,
        command=command,
        date=date,
        commit=_commit(plan.root),
        machine=_machine(),
        model=_model(),
        stages=plan.stage_infos(),
    )
    _write_json(path, asdict(info))


def gather_findings(plan: Plan) -> None:
    """Write ``eval/losses.json`` and ``eval/checks.json`` from the output of the evaluation steps."""
    from megatron_vl.report.checks import compare_language_models

    losses = []
    for evaluation in EVALUATIONS:
        found = json.loads(plan.losses_path(evaluation).read_text(encoding="utf-8"))
        for task in evaluation.tasks:
            entry = found[str(plan.heldout_prefix(task))]
            loss = HeldOutLoss(evaluation.stage, evaluation.model, task, entry["loss"], entry["num_tokens"])
            losses.append(asdict(loss))
    check = compare_language_models(plan.exported(STAGES[0]), plan.exported(STAGES[1]))
    _write_json(plan.run_dir / "eval" / "losses.json", losses)
    _write_json(plan.run_dir / "eval" / "checks.json", [asdict(check)])


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _commit(root: Path) -> str:
    """Return the commit of the checkout, with a + if files differ from it; a dash without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "–"


def _machine() -> Mapping[str, str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "Processor": _processor(),
        "Cores": str(os.cpu_count()),
        "Memory": f"{memory / 2**30:.0f} GiB",
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "Packages": f"PyTorch {version('torch')}, Megatron-Core {version('megatron-core')}",
    }


def _processor() -> str:
    """Return the name of the processor, as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _model() -> Mapping[str, str]:
    model = PRESETS[PRESET]
    return {
        "Parameters": f"{sum(count_parameters(model).values()):,}",
        "Vision tower": f"{model.vision.num_layers} layers of {model.vision.hidden_size}",
        "Language model": f"{model.language.num_layers} layers of {model.language.hidden_size}",
        "Images": f"{model.image_size} px, {model.num_patches} patches, {model.resampler.num_queries} slots",
        "Vocabulary": f"{model.language.vocab_size:,} rows",
    }
