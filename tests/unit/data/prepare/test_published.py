"""Every caption and question set by its name, from the files as downloaded to packed rows: nothing is lost unsaid."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.sources.presets import DATA_SETS
from tests.helpers.data import published_captions as captions
from tests.helpers.data import published_vqa as questions
from tests.helpers.data.prepared import write_recipe
from tests.helpers.data.published_captions import Download
from tests.helpers.data.reading import read_all

SETS: dict[str, dict[str, Any]] = {
    "laion_en": {"path": "laion_en"},
    "laion_zh": {"path": "laion_zh"},
    "laion_coco": {"path": "laion_coco"},
    "datacomp": {"path": "datacomp"},
    "coyo": {"path": "coyo"},
    "cc12m": {"path": "cc12m"},
    "cc3m": {"path": "cc3m"},
    "sbu": {"path": "sbu"},
    "coco_caption": {"path": "coco/dataset_coco.json", "image_root": "coco"},
    "vqav2": {
        "questions": "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": "vqav2/v2_mscoco_train2014_annotations.json",
        "image_root": "vqav2",
    },
    "gqa": {"questions": "gqa/train_balanced_questions.json", "image_root": "gqa"},
    "vgqa": {"questions": "vg/question_answers.json", "image_root": "vg"},
    "dvqa": {"questions": "dvqa/train_qa.json", "image_root": "dvqa"},
    "ocr_vqa": {"questions": "ocr_vqa/dataset.json", "image_root": "ocr_vqa"},
    "docvqa": {"questions": "docvqa/train_v1.0.json", "image_root": "docvqa"},
    "textvqa": {"questions": "textvqa/TextVQA_0.5.1_val.json", "image_root": "textvqa"},
    "chartqa": {
        "questions": "chartqa/ChartQA Dataset/train/train_human.json",
        "image_root": "chartqa/ChartQA Dataset/train",
    },
    "ai2d": {"path": "ai2d/ai2d", "test_ids": "ai2d/ai2d_test_ids.csv"},
}


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that says that it has 2.5 gigapixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def write_downloads(folder: Path) -> None:
    questions.write_all(folder)
    (folder / "coco").mkdir()
    captions.write_karpathy(folder / "coco")
    captions.write_webdataset(folder / "laion_en", captions.laion_en())
    captions.write_files(folder / "laion_zh", captions.laion_zh())
    captions.write_parquet(folder / "laion_coco", captions.laion_coco())
    captions.write_webdataset(folder / "datacomp", captions.datacomp(), shard="00000000", digits=12)
    captions.write_webdataset(folder / "coyo", captions.coyo())
    captions.write_webdataset(folder / "cc12m", [Download(0, "a <PERSON> smiles"), Download(1, "x", image=bomb())])
    captions.write_parquet(folder / "cc3m", [Download(0, "a view of the lake"), Download(1, "gone", failed=True)])
    captions.write_webdataset(folder / "sbu", [Download(0, "Interior design"), Download(1, "cut off")])
    tar = folder / "sbu" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:5_000])


def test_from_downloads_to_rows(tmp_path: Path) -> None:
    write_downloads(tmp_path)
    sources = [{"name": name, "type": name, **options} for name, options in SETS.items()]
    recipe = load_recipe(write_recipe(tmp_path, sources=sources, seq_length=256))
    manifest = prepare(recipe, tmp_path / "set", progress=False)
    for entry in recipe.sources:
        name = entry.source.name
        kept = sum(count.samples for count in manifest.counts if count.source == name)
        lost = sum(skip.count for skip in manifest.skips if skip.source == name)
        assert kept > 0, name
        assert kept + lost == len(read_all(entry.source)), name
    reasons = {(skip.source, skip.reason): skip.count for skip in manifest.skips}
    assert reasons["cc12m", "image_too_large"] == 1, "the bomb"
    assert reasons["laion_en", "unreadable_image"] == 1, "the JPEG that was cut"
    assert reasons["cc3m", "not_downloaded"] == 1
    assert reasons["sbu", "truncated_tar"] == 1
    assert {count.task for count in manifest.counts} == {"caption", "vqa"}


def test_every_named_set_of_captions_and_questions_is_tried() -> None:
    formats = ("img2dataset", "karpathy", "vqa")
    assert {name for name, (format_name, _) in DATA_SETS.items() if format_name in formats} == set(SETS) - {"ai2d"}
