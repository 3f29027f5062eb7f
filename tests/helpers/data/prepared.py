"""What the tests of the data core share: raw data, a recipe over it, and the data set made from it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from megatron_vl.config.schema import DataConfig, RunConfig, TrainingConfig
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from tests.helpers.data.reading import write_tar
from tests.helpers.tiny import MODEL

QUERIES, RANKS, SEQ_LENGTH = MODEL.resampler.num_queries, MODEL.num_bpe_tokens, 64
NUM_CAPTIONS, NUM_DOCUMENTS = 30, 12


def png(shade: int, side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 255 - shade, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_raw(folder: Path) -> Path:
    """Captions in three tars (every image twice), and text documents, some longer than a row."""
    for shard in range(3):
        members = []
        for i in range(shard * 10, shard * 10 + 10):
            members += [(f"{i:04d}.png", png(i // 2)), (f"{i:04d}.txt", f"shade {'x' * (i % 7)} {i}".encode())]
        write_tar(folder / "captions" / f"{shard:05d}.tar", members)
    lines = [json.dumps({"text": f"document {i}: " + "words and more " * (i * 2)}) for i in range(NUM_DOCUMENTS)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def recipe_values(**changes: Any) -> dict[str, Any]:
    return {
        "sources": [
            {"name": "captions", "type": "img2dataset", "path": "captions"},
            {"name": "documents", "type": "text", "path": "text.jsonl"},
        ],
        "seq_length": SEQ_LENGTH,
        "num_queries": QUERIES,
        "num_bpe_tokens": RANKS,
        **changes,
    }


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(recipe_values(**changes)), encoding="utf-8")
    return path


def make_data_set(folder: Path, name: str = "set", **changes: Any) -> str:
    """Prepare the raw data of ``folder`` (written if absent) and return the prefix."""
    if not (folder / "captions").exists():
        write_raw(folder)
    prepare(load_recipe(write_recipe(folder, **changes)), folder / name, progress=False)
    return str(folder / name)


def run_config(*data_path: str, training: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    return RunConfig(
        model=MODEL,
        data=DataConfig(**{"data_path": data_path, "seq_length": SEQ_LENGTH, "num_workers": 0, **data}),
        training=TrainingConfig(**{"micro_batch_size": 2, "global_batch_size": 8, **(training or {})}),
    )
