"""A small prepared data set for the model of ``tests/helpers/tiny.py``, made through the public commands."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.cli import prepare, synthetic
from tests.helpers.tiny import MODEL

RECIPE = """
sources:
  - {{name: captions, type: img2dataset, path: caption}}
  - {{name: expressions, type: refexp, path: refexp/refexp.json, image_root: refexp/images}}
  - {{name: text, type: text, path: text}}
seq_length: {seq_length}
num_queries: {num_queries}
num_bpe_tokens: {num_bpe_tokens}
"""
SEQ_LENGTH = 256


def prepare_tiny(folder: Path, *, seed: int = 1) -> str:
    """Render a few scenes, prepare them, and return the prefix of the packed data set."""
    counts = ["--count", "caption=24", "--count", "refexp=12", "--count", "text=40"]
    others = [f"--count={family}=0" for family in ("grounded_caption", "vqa", "ocr", "chat", "photos")]
    raw, recipe, prefix = folder / "raw", folder / "recipe.yaml", folder / "rows"
    make = [str(raw), "--profile", "tiny", "--seed", str(seed), "--num-workers", "1", "--no-progress"]
    assert synthetic.main([*make, *counts, *others]) == 0
    queries, tokens = MODEL.resampler.num_queries, MODEL.num_bpe_tokens
    sizes = {"seq_length": SEQ_LENGTH, "num_queries": queries, "num_bpe_tokens": tokens}
    recipe.write_text(RECIPE.format(**sizes))
    done = prepare.main([str(recipe), "--root", str(raw), "--output", str(prefix), "--workers", "1", "--quiet"])
    assert done == 0
    return str(prefix)
