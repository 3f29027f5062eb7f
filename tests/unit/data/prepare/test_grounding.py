"""Grounding, reading and dialogues from the files as downloaded to packed rows: nothing is lost unsaid.

The recipes of ``examples/qwen_vl/data/README.md`` are taken from the page itself.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.dataset.manifest import Manifest
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from tests.helpers.data.prepared import QUERIES, RANKS, write_recipe
from tests.helpers.data.published_captions import Download, picture, write_webdataset
from tests.helpers.data.published_grounding import write_downloads
from tests.helpers.data.reading import read_all, write_json
from tests.unit.data.sources.test_pdf import LINES, make_pdf, show

README = Path(__file__).resolve().parents[4] / "examples" / "qwen_vl" / "data" / "README.md"


def check_account(recipe: DataRecipe, manifest: Manifest) -> dict[str, tuple[str, int, int]]:
    """Task, kept and left out of each source, after checking that they are all records that the reader gives."""
    found = {}
    for entry in recipe.sources:
        name = entry.source.name
        tasks = {count.task: count.samples for count in manifest.counts if count.source == name}
        lost = sum(skip.count for skip in manifest.skips if skip.source == name)
        assert sum(tasks.values()) + lost == len(read_all(entry.source)), name
        found[name] = ("+".join(sorted(tasks)), sum(tasks.values()), lost)
    return found


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_recipes_of_the_page_take_everything_from_the_downloads(tmp_path: Path, unpacked: bool) -> None:
    write_downloads(tmp_path / "downloads")
    if unpacked:
        for archive in (tmp_path / "downloads").glob("*/*.zip"):
            shutil.unpack_archive(archive, archive.parent)
            archive.unlink()
    root = "image_root: coco/train2017"
    assert f"`{root}`" in README.read_text() and f"{root}.zip/train2017" in README.read_text()
    found = {}
    for text, name in re.findall(r"^```yaml\n(# (\S+\.yaml)\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL):
        text = text.replace(f"{root}.zip/train2017", root) if unpacked else text
        (tmp_path / name).write_text(text, encoding="utf-8")
        defaults = {"num_queries": QUERIES, "num_bpe_tokens": RANKS}
        recipe = load_recipe(tmp_path / name, defaults, root=tmp_path / "downloads")
        found |= check_account(recipe, prepare(recipe, tmp_path / Path(name).stem, progress=False))
    assert found == {
        "refcoco": ("referring", 40, 0),
        "refcoco_plus": ("referring", 40, 0),
        "refcocog": ("referring", 40, 0),
        "refcocog_regions": ("region_caption", 40, 0),
        "textvqa": ("vqa", 2, 1),
        "llava": ("chat", 24, 0),
    }


def phrases(*boxes: tuple[int, int, float]) -> list[list[float]]:
    return [[float(start), float(end), 0.1, 0.2, 0.5, edge, 0.9] for start, end, edge in boxes]


def test_the_other_sets_become_rows(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    write_downloads(tmp_path)
    exps = phrases((19, 32, 0.9), (0, 32, 0.9), (0, 13, 0.9))
    caption = "a wire hanger with a paper cover"
    grit = [Download(3, caption, {"ref_exps": exps}), Download(5, "short", {"ref_exps": phrases((0, 9, 0.9))})]
    write_webdataset(tmp_path / "grit", grit)
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "VG_100K" / "1.jpg").write_bytes(picture(7))
    url = "https://cs.stanford.edu/people/rak248/VG_100K/"
    sizes = {"width": 32, "height": 24, "coco_id": 5}
    write_json(tmp_path / "images.json", [{**sizes, "image_id": i, "url": f"{url}{i}.jpg"} for i in (1, 2)])
    region = {"x": -3, "y": 2, "width": 20, "height": 9, "phrase": "a thing "}
    regions = [{"id": number, "regions": [region, {**region, "width": 0}]} for number in (1, 2)]
    write_json(tmp_path / "regions.json", regions)
    truth = json.dumps({"gt_parse": {"text_sequence": "some words"}})
    (tmp_path / "image_0.jpg").write_bytes(picture(9))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "image_0.jpg", "ground_truth": truth}))
    (tmp_path / "pdf").mkdir()
    (tmp_path / "pdf" / "a.pdf").write_bytes(make_pdf(show(*LINES), show("short")))
    (tmp_path / "pdf" / "b.pdf").write_bytes(b"%PDF-1.4 cut")
    vg: dict[str, Any] = {
        "type": "visual_genome",
        "regions": "regions.json",
        "images": "images.json",
        "image_root": ".",
    }
    sources: list[dict[str, Any]] = [
        {"name": "grit", "type": "grit", "path": "grit"},
        {"name": "grit_referring", "type": "grit", "path": "grit", "task": "referring"},
        {"name": "vg", **vg},
        {"name": "vg_untested", **vg, "refcoco_root": "refer"},
        {"name": "synthdog", "type": "synthdog_en", "path": "metadata.jsonl", "question": "What is written here?"},
        {"name": "pdf", "type": "pdf", "path": "pdf"},
    ]
    recipe = load_recipe(write_recipe(tmp_path, sources=sources, allow_empty=True, seq_length=1024))
    manifest = prepare(recipe, tmp_path / "set", progress=False)
    assert check_account(recipe, manifest) == {
        "grit": ("grounded_caption", 1, 1),
        "grit_referring": ("referring", 2, 2),
        "vg": ("referring", 1, 3),
        "vg_untested": ("", 0, 4),
        "synthdog": ("vqa", 1, 0),
        "pdf": ("ocr", 1, 2),
    }
