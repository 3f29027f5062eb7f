"""A made-up run directory with every file that a report reads, small and deterministic."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from megatron_vl.data.dataset.manifest import (
    FORMAT_VERSION,
    CountEntry,
    Manifest,
    SkipEntry,
    SourceTotals,
    write_manifest,
)

LAYOUTS = {
    "stage0": ("TP 1 x PP 1 x DP 2", None),
    "stage1": ("TP 1 x PP 1 x DP 2", "TP 2 x PP 2 x DP 1"),
    "stage2": ("TP 1 x PP 1 x DP 2", "TP 1 x PP 2 x DP 2"),
    "stage3": ("TP 1 x PP 1 x DP 2", "TP 1 x PP 2 x DP 1 x VP 2"),
}
TITLES = {
    "stage0": ("Stage 0: text", "language model", "random weights"),
    "stage1": ("Stage 1: pre-training", "vision tower, resampler", "stage 0"),
    "stage2": ("Stage 2: multi-task", "everything", "stage 1"),
    "stage3": ("Stage 3: supervised fine-tuning", "language model, resampler", "stage 2"),
}
TASKS = ("caption", "vqa", "referring", "ocr")


def write_fake_run(run_dir: Path, *, num_steps: int = 200, samples_per_task: int = 6) -> Path:
    """Fill ``run_dir`` and return it."""
    _write_json(run_dir / "run.json", _run_info())
    for stage in TITLES:
        _write_metrics(run_dir / "model" / stage, LAYOUTS[stage], num_steps, floor=0.4)
    for stage in ("stage1", "stage2"):
        _write_metrics(run_dir / "blind" / stage, (LAYOUTS[stage][0], None), num_steps, floor=1.3)
    (run_dir / "data").mkdir()
    _write_predictions(run_dir / "eval", samples_per_task)
    _write_findings(run_dir / "eval")
    for name in ("stage1", "stage2"):
        write_manifest(run_dir / "data" / name, _manifest())
    steps = {"install": 171.2, "synthesise data": 31.0, "stage 1": 96.4, "stage 2": 181.9, "report": 4.2}
    begins = itertools.accumulate(steps.values(), initial=1e9)
    times = [{"step": step, "seconds": steps[step], "began": began} for step, began in zip(steps, begins, strict=False)]
    _write_lines(run_dir / "timings.jsonl", times)
    return run_dir


def _run_info() -> dict[str, Any]:
    stages = [
        {
            "name": name,
            "title": title,
            "trains": trains,
            "starts_from": starts_from,
            "folder": f"model/{name}",
            "recipe": f"examples/tiny/{name}.yaml",
            "blind_folder": f"blind/{name}" if name in ("stage1", "stage2") else None,
        }
        for name, (title, trains, starts_from) in TITLES.items()
    ]
    return {
        "title": "megatron_vl quickstart",
        "profile": "quickstart",
        "command": "bash examples/quickstart.sh",
        "date": "2026-11-23 10:12 UTC",
        "commit": "4c50a1e",
        "machine": {"Processor": "an <example> processor", "Cores": "2", "PyTorch": "2.13.0"},
        "model": {"Vision tower": "3 layers of 128", "Language model": "3 layers of 128"},
        "stages": stages,
    }


def _write_metrics(folder: Path, layouts: tuple[str, str | None], num_steps: int, *, floor: float) -> None:
    noise = random.Random(str(folder.name))
    hand_over = num_steps - num_steps // 5
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        late = layouts[1] is not None and step > hand_over
        lines.append(
            {
                "iteration": step,
                "lm_loss": floor + 5 * math.exp(-step / 30) + noise.gauss(0, 0.1),
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_second": 3000.0 if late else 9000.0 + noise.random(),
                "images_per_second": 70.0 if late else 210.0,
                "tflops_per_rank": 0.02,
                "layout": layouts[1] if late else layouts[0],
            }
        )
    lines.append({"iteration": num_steps, "validation_loss": floor})
    _write_lines(folder / "metrics.jsonl", lines)


def _write_predictions(folder: Path, samples_per_task: int) -> None:
    seeing, blind = [], []
    for index in range(samples_per_task):
        for task in TASKS:
            question = _question(folder, task, index)
            seeing.append(question)
            blind.append({**question, "prediction": "<box>(100,100),(900,900)</box>"})
    replies = [{**line, "task": "chat", "prompt": "Find it."} for line in seeing if line["task"] == "referring"]
    _write_lines(folder / "replies.jsonl", replies)
    _write_lines(folder / "predictions_model.jsonl", seeing)
    _write_lines(folder / "predictions_blind.jsonl", blind)


def _question(folder: Path, task: str, index: int) -> dict[str, Any]:
    left = 100 + 60 * index
    box = f"({left},300),({left + 300},600)"
    guess = f"({left + 20 * index},320),({left + 300 + 30 * index},600)"
    quad = f"<quad>({left},400),({left + 200},420),({left + 200},520),({left},500)</quad>"
    prompt, truth, said = {
        "caption": (
            "Generate the caption in English:",
            " A red ball left of a blue cube.",
            " a red ball left of a blue cube.",
        ),
        "vqa": ("What color is the ball? Answer:", " red", " red" if index % 3 else " blue"),
        "referring": ("<ref>the red ball</ref>", f"<box>{box}</box>", f"<box>{guess}</box>"),
        "ocr": ("OCR with grounding:", f"<ref> oak elm</ref>{quad}", f"<ref> oak</ref>{quad}"),
    }[task]
    image = f"images/{task}-{index}.png"
    _draw_scene(folder / image, left)
    key = f"{task}-{index}"
    return {
        "key": key,
        "task": task,
        "image": image,
        "prompt": prompt,
        "reference": truth,
        "prediction": said,
        **({"annotators": [truth.strip()] * 10} if task == "vqa" else {}),
    }


def _draw_scene(path: Path, left: int) -> None:
    image = Image.new("RGB", (84, 84), "#d8d5cc")
    x = left * 84 / 1000
    ImageDraw.Draw(image).ellipse((x, 25, x + 25, 50), fill="#c02020")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _write_findings(folder: Path) -> None:
    (folder / "losses").mkdir()
    for stage, tasks in (("stage1", ("caption",)), ("stage2", TASKS), ("stage3", ("chat",))):
        for model, loss in (("model", 0.52), ("blind", 1.41)):
            losses = {f"data/heldout_{task}": {"loss": loss, "num_tokens": 4000} for task in tasks}
            _write_json(folder / "losses" / f"{model}_{stage}.json", losses)
    detail = "39 of 39 tensors bit-identical"
    _write_json(folder / "checks.json", [{"name": "language_model_unchanged", "passed": True, "detail": detail}])


def _manifest() -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256="0" * 64,
        num_bpe_tokens=2048,
        num_queries=16,
        seq_length=512,
        max_sample_length=512,
        packing="mixed",
        num_rows=1200,
        num_samples=32000,
        num_segments=32000,
        num_tokens=600_000,
        num_images=12000,
        num_stored_images=12000,
        images_per_row=(0, 1200),
        sources=(SourceTotals("captions", 12002, 12000), SourceTotals("text", 20000, 20000)),
        counts=(
            CountEntry("captions", "caption", 12000, 300_000, 12000),
            CountEntry("text", "text", 20000, 300_000, 0),
        ),
        skips=(SkipEntry("captions", "unreadable_image", 2, ("00000/000000003: truncated",)),),
        files=(),
        amounts_factor=1.0,
        scarcest_group="",
        hashes_sha256="0" * 64,
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
