"""Every recipe of a training stage in ``examples/``, scaled down in sizes only.

A case keeps what the recipe chooses: optimizer, layer decay, warm-up, what is frozen, attention span, the unit of the
batch, the data sets of its own command with their weights, and whether it starts from an earlier stage. What is scaled
is the model, the images (in the recipe's ratio to the position table), the rows, and the number of steps; the layout is
the test's. A recipe that is added to ``examples/`` is a case by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vl.cli import prepare, synthetic
from megatron_vl.config.load import load_config
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.data.loading.plan import DataPlan
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {f"{path.parent.name}-{path.stem}": path for path in sorted(ROOT.glob("examples/*/stage*.yaml"))}
MODEL = replace(tiny.MODEL, vision=replace(tiny.MODEL.vision, position_grid=4))
"""Its images have numbers of patches that two tensor-parallel ranks can split."""
STEPS = 10
MICRO_BATCHES = 4
"""Of a step, over all data-parallel ranks."""
SEQ_LENGTH = 256
SOURCES = {
    "images": """
  - {name: captions, type: img2dataset, path: caption}
  - {name: expressions, type: refexp, path: refexp/refexp.json, image_root: refexp/images}
""",
    "text": """
  - {name: text, type: text, path: text}
""",
    "chats": """
  - {name: chats, type: qwen_vl_chat, path: chat/chat.json, image_root: chat}
""",
}
DataSets = dict[str, str]
"""Prefix of a prepared data set by the name of its sources."""


def prepare_data_sets(folder: Path) -> DataSets:
    """Prepare a small data set of each kind through the public commands."""
    others = dict.fromkeys(("grounded_caption", "vqa", "ocr", "photos"), 0)
    counts = {"caption": 16, "refexp": 12, "text": 40, "chat": 16} | others
    make = [str(folder / "raw"), "--profile", "tiny", "--seed", "1", "--num-workers", "1", "--no-progress"]
    assert synthetic.main([*make, *(f"--count={family}={count}" for family, count in counts.items())]) == 0
    queries, tokens = MODEL.resampler.num_queries, MODEL.num_bpe_tokens
    sizes = {"seq_length": SEQ_LENGTH, "num_queries": queries, "num_bpe_tokens": tokens}
    prefixes = {}
    for name, sources in SOURCES.items():
        recipe, prefix = folder / f"{name}.yaml", folder / name
        recipe.write_text(f"sources:{sources}" + "".join(f"{key}: {value}\n" for key, value in sizes.items()))
        given = [str(recipe), "--root", str(folder / "raw"), "--output", str(prefix), "--workers", "1", "--quiet"]
        assert prepare.main(given) == 0
        prefixes[name] = str(prefix)
    return prefixes


@dataclass(frozen=True)
class Case:
    """A recipe with small data sets; ``start`` is a checkpoint of the tiny model."""

    name: str
    data_sets: DataSets
    start: Path

    def config(self, **sections: dict[str, Any]) -> RunConfig:
        """The recipe scaled down; keyword ``section={"field": value}`` overrides single fields."""
        path = RECIPES[self.name]
        config = _scaled(load_config(path), self._data_path(path))
        pretrained = str(self.start) if "--pretrained-checkpoint" in path.read_text() else None
        sections["checkpoint"] = {"pretrained_checkpoint": pretrained} | sections.get("checkpoint", {})
        for section, fields in sections.items():
            config = replace(config, **{section: replace(getattr(config, section), **fields)})
        return config

    def _data_path(self, recipe: Path) -> tuple[str, ...]:
        """What the recipe's own command gives as --data-path, each data set replaced by a small one of its kind."""
        command = re.search(r"--data-path((?: (?!--)[\w./]+)+)", recipe.read_text())
        assert command, f"{recipe}: the header has a command with --data-path"
        return tuple(word if re.fullmatch(r"[\d.]+", word) else self._of_kind(word) for word in command[1].split())

    def _of_kind(self, word: str) -> str:
        kinds = {"text": "text", "chat": "chats", "sft": "chats"}
        return self.data_sets[next((kind for part, kind in kinds.items() if part in word.lower()), "images")]


def _scaled(config: RunConfig, data_path: tuple[str, ...]) -> RunConfig:
    ratio = config.model.patch_grid / config.model.vision.position_grid
    side = MODEL.vision.patch_size * round(MODEL.vision.position_grid * ratio)
    training, optimizer = config.training, config.optimizer
    warmup = optimizer.lr_warmup_iters and max(2, round(STEPS * optimizer.lr_warmup_iters / training.train_iters))
    rows = MICRO_BATCHES * training.micro_batch_size
    scaled = replace(
        config,
        model=replace(MODEL, image_size=side),
        parallel=ParallelConfig(backend="local"),
        data=replace(config.data, data_path=data_path, seq_length=SEQ_LENGTH, num_workers=0),
        training=replace(training, train_iters=STEPS, global_batch_size=rows, bf16=False),
        optimizer=replace(optimizer, lr_warmup_iters=warmup),
        checkpoint=replace(config.checkpoint, save_interval=None, keep_last=None),
        logging=replace(config.logging, log_interval=1, progress=False),
    )
    if training.global_batch_samples is None:
        return scaled
    samples = round(rows * DataPlan.read(scaled).samples_per_row)
    return replace(scaled, training=replace(scaled.training, global_batch_samples=samples))
