"""Record what is run on what machine, and what the weights of the finished stages show."""

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

from megatron_vl.config.presets import PRESETS
from megatron_vl.files import write_whole
from megatron_vl.planning.parameters import count_parameters
from megatron_vl.report.records import RunInfo, StageInfo

PRESET = "tiny"
TITLES = {
    "smoke": "Smoke test of the quickstart",
    "quickstart": "Quickstart: a tiny Qwen-VL through its three stages",
    "learn": "A tiny Qwen-VL that learns to see",
}
STAGES = tuple(
    StageInfo(
        name=f"stage{number}",
        title=f"Stage {number}: {title}",
        trains=trains,
        starts_from=f"stage {number - 1}" if number else "random weights",
        folder=f"model/stage{number}",
        recipe=f"examples/tiny/{recipe}.yaml",
        blind_folder=f"blind/stage{number}" if number in (1, 2) else None,
    )
    for number, (recipe, title, trains) in enumerate(
        (
            ("stage0_text", "text alone", "the language model"),
            ("stage1_pretrain", "pre-training", "vision tower and resampler"),
            ("stage2_multitask", "multi-task pre-training", "everything"),
            ("stage3_sft", "supervised fine-tuning", "language model and resampler"),
        )
    )
)


def write_run_info(run_dir: Path, profile: str, command: str) -> None:
    """Write ``run.json``; a resumed run keeps the date of its start, and names the commits of all starts."""
    path = run_dir / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    commits = before.get("commit", "").split(", ") if before else []
    if (commit := _commit()) not in commits:
        commits.append(commit)
    info = RunInfo(
        title=TITLES[profile],
        profile=profile,
        command=command,
        date=before.get("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        commit=", ".join(commits),
        machine=_machine(),
        model=_model(),
        stages=STAGES,
    )
    _write_json(path, asdict(info))


def write_checks(run_dir: Path) -> None:
    """Write ``eval/checks.json``: what the exported folders say of the frozen language model."""
    from megatron_vl.report.checks import compare_language_models

    check = compare_language_models(run_dir / "hf" / "stage0", run_dir / "hf" / "stage1")
    _write_json(run_dir / "eval" / "checks.json", [asdict(check)])


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _commit() -> str:
    """Return the commit of the checkout, with a + if files differ from it; a dash without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

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
