"""Any value of any record may be anything: such a record is counted under a reason, and the work goes on.

Every format whose records are JSON is laid out as published; then one value of one file is replaced by something that
has no business there, and the source is made into a part. Either a file is refused by name (DataError), or all that
the reader gives is kept or counted. No other exception may come.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.formats.pickles import load_plain_pickle
from megatron_vl.data.prepare.part_files import read_index
from megatron_vl.data.prepare.parts import part_prefix, plan_units, write_part
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from megatron_vl.data.sources.registry import SOURCES
from megatron_vl.errors import DataError
from tests.helpers.data import published_captions, published_grounding, published_vqa
from tests.helpers.data.prepared import write_recipe
from tests.helpers.data.reading import read_all, write_json, write_tar

HOSTILE = (
    10**400, -(10**400), -1, 0, 1.5, float("nan"), float("inf"), True, None, "", "x", "\ud800", "../x", "a\0b",
    "http://x/y.jpg", "y" * 5000, [], [[]], {}, {"x": None}, ["x"] * 5,
)  # fmt: skip
MUTATIONS = 100
"""Of each source, taken at random from a fixed seed."""
CLEANING = {
    "min_side": 4, "max_aspect_ratio": 4, "min_characters": 1, "letters": "latin_han", "drop_emoji": True,
    "strip_html": True, "strip_irregular": True,
}  # fmt: skip
SCORED = {"img2dataset", "laion_coco", "grounded_caption", "grit", "pairs"}


def images(folder: Path) -> Path:
    published_vqa.write_images(folder, ["a.jpg", "b.png"])
    return folder


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_pairs(folder: Path) -> None:
    lines(images(folder) / "p.jsonl", {"image": "a.jpg", "caption": "a kettle", "clip": 0.3, "lang": "en"})


def write_pages(folder: Path) -> None:
    line = {"text": "a word", "quad": [[0, 0], [20, 0], [20, 9.5], [0, 9]]}
    truth = {"gt_parse": {"text_sequence": "words"}}
    page = {"file_name": "a.jpg", "size": [32, 24], "lang": "en", "lines": [line, line], "ground_truth": "{}"}
    plain = {"file_name": "b.png", "ground_truth": json.dumps(truth)}
    lines(images(folder) / "metadata.jsonl", page, plain)


def write_interleaved(folder: Path) -> None:
    mmc4 = {"text_list": ["A", "B"], "image_info": [{"image_name": "b.png", "matched_text_index": 1}]}
    lines(images(folder) / "d.jsonl", {"texts": ["A", None, "B"], "images": [None, "a.jpg", None]}, mmc4)


def write_chat(folder: Path) -> None:
    values = ("user", "Picture 1: <img>a.jpg</img>\nWhat?"), ("assistant", "<ref>It</ref><box>(1,2),(3,4)</box>")
    turns = [{"from": role, "value": value} for role, value in values]
    write_json(images(folder) / "c.json", [{"id": "1", "conversations": turns}])


def write_llava(folder: Path) -> None:
    values = ("human", "<image>\nWhere?"), ("gpt", "[0.1, 0.2, 0.5, 0.9]")
    turns = [{"from": role, "value": value} for role, value in values]
    write_json(images(folder) / "c.json", [{"id": "1", "image": "a.jpg", "conversations": turns}])


def write_refexp(folder: Path) -> None:
    image = {"id": 1, "file_name": "a.jpg", "height": 24, "width": 32, "caption": "the left one"}
    write_json(images(folder) / "r.json", {"images": [image], "annotations": [{"image_id": 1, "bbox": [1, 2.5, 9, 8]}]})


def write_visual_genome(folder: Path) -> None:
    published_vqa.write_images(folder, ["VG_100K/1.jpg"])
    place = {"x": 2, "y": 3, "width": 9, "height": 8}
    write_json(
        folder / "regions.json", [{"id": 1, "regions": [{"image_id": 1, "phrase": "a tree", "region_id": 4, **place}]}]
    )
    facts = {"image_id": 1, "width": 32, "height": 24, "coco_id": None, "url": "https://s.ex/VG_100K/1.jpg"}
    write_json(folder / "images.json", [facts])


def write_grit(folder: Path) -> None:
    entries = [[0.0, 8.0, 0.1, 0.2, 0.5, 0.75, 0.9], [9.0, 11.0, 0.0, 0.0, 0.5, 0.5, 0.7]]
    sizes = {"width": 32, "height": 24, "original_width": 64, "original_height": 48}
    meta = {"caption": "a kettle on", "clip_similarity_vitb32": 0.3, "ref_exps": entries, "noun_chunks": [], **sizes}
    write_tar(folder / "00000.tar", [("1.jpg", published_captions.picture(9)), ("1.json", json.dumps(meta).encode())])


Layout = tuple[Callable[[Path], Any], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "img2dataset": (
        lambda folder: published_captions.write_webdataset(folder, published_captions.laion_en()),
        {"path": ".", "score_field": "similarity"},
    ),
    "laion_coco": (
        lambda folder: published_captions.write_webdataset(folder, published_captions.laion_coco()),
        {"path": "."},
    ),
    "grounded_caption": (write_grit, {"path": "."}),
    "grit": (write_grit, {"path": ".", "task": "referring"}),
    "coco_caption": (published_captions.write_karpathy, {"path": "dataset_coco.json", "image_root": "."}),
    "pairs": (write_pairs, {"path": "p.jsonl", "image_root": ".", "score_field": "clip"}),
    "vqav2": (
        published_vqa.write_vqav2,
        {
            "questions": "v2_OpenEnded_mscoco_train2014_questions.json",
            "annotations": "v2_mscoco_train2014_annotations.json",
            "image_root": ".",
        },
    ),
    "gqa": (published_vqa.write_gqa, {"questions": "train_balanced_questions.json", "image_root": "."}),
    "vgqa": (published_vqa.write_vgqa, {"questions": "question_answers.json", "image_root": "."}),
    "ocr_vqa": (published_vqa.write_ocr_vqa, {"questions": "dataset.json", "image_root": "."}),
    "textvqa": (published_vqa.write_textvqa, {"questions": "TextVQA_0.5.1_val.json", "image_root": "."}),
    "ai2d": (published_vqa.write_ai2d, {"path": "ai2d", "test_ids": "ai2d_test_ids.csv"}),
    "refexp": (write_refexp, {"path": "r.json", "image_root": "."}),
    "refcoco": (published_grounding.write_refcoco, {"path": "refer/data/refcoco", "image_root": "train2014"}),
    "visual_genome": (write_visual_genome, {"regions": "regions.json", "images": "images.json", "image_root": "."}),
    "ocr": (write_pages, {"path": ".", "question": "What is written?"}),
    "interleaved": (write_interleaved, {"path": "d.jsonl", "image_root": "."}),
    "text": (
        lambda folder: lines(folder / "t.jsonl", {"text": "a document"}, {"text": "another"}),
        {"path": "t.jsonl"},
    ),
    "qwen_vl_chat": (write_chat, {"path": "c.json", "image_root": "."}),
    "llava": (write_llava, {"path": "c.json", "image_root": "."}),
}
OF_FILES = {"pdf", "html"}
"""Formats without records; their own tests damage them."""


def test_every_format_is_tried(tmp_path: Path) -> None:
    formats = {type(recipe_of(tmp_path, name).sources[0].source) for name in LAYOUTS}
    assert formats == {SOURCES[name] for name in SOURCES.keys() - OF_FILES}


def recipe_of(folder: Path, name: str) -> DataRecipe:
    filters = {**CLEANING, **({"min_score": 0.1} if name in SCORED else {})}
    entry = {"name": name, "type": name, **LAYOUTS[name][1], "filters": filters}
    return load_recipe(write_recipe(folder, sources=[entry], seq_length=256))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_value_may_be_anything(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    LAYOUTS[name][0](data)
    recipe = recipe_of(data, name)
    kept, lost = make_parts(recipe, tmp_path)
    assert kept > 0, "as published it is read"
    assert kept + lost == len(read_all(recipe.sources[0].source))
    rng = random.Random(name)
    mutations = [(*place, value) for place, value in itertools.product(places(data), HOSTILE)]
    for path, index, where, value in rng.sample(mutations, min(MUTATIONS, len(mutations))):
        before = path.read_bytes()
        documents = load_documents(path)
        store_documents(path, replaced(documents, (index, *where), value))
        try:
            kept, lost = make_parts(recipe, tmp_path)
            assert kept + lost == len(read_all(recipe.sources[0].source)), (path.name, where, value)
        except DataError as error:
            assert str(error)
        except Exception as error:
            raise AssertionError(f"{path.name}: {where} = {value!r:.40}") from error
        path.write_bytes(before)


def make_parts(recipe: DataRecipe, folder: Path) -> tuple[int, int]:
    """Samples kept and records left out."""
    kept = lost = 0
    for unit in plan_units(recipe):
        found = write_part(recipe, unit, folder)
        index = read_index(part_prefix(folder, unit))
        assert index is not None and index.num_samples == found
        kept, lost = kept + found, lost + len(index.outcomes) - found
    return kept, lost


def places(folder: Path) -> Iterator[tuple[Path, int, tuple[Any, ...]]]:
    """Every place of a value in every document of every file: file, document, keys."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".tar", ".p"):
            for index, document in enumerate(load_documents(path)):
                for where in inside(document):
                    yield path, index, where


def inside(value: Any) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (key,)
        for rest in inside(item):
            yield (key, *rest)


def replaced(documents: list[Any], where: tuple[Any, ...], value: Any) -> list[Any]:
    changed = copy.deepcopy(documents)
    *parents, last = where
    target: Any = changed
    for key in parents:
        target = target[key]
    target[last] = value
    return changed


def load_documents(path: Path) -> list[Any]:
    """The JSON documents of a file, or the Python objects of a pickle; of a tar those of its members."""
    if path.suffix == ".p":
        return [load_plain_pickle(path)]
    if path.suffix == ".tar":
        return [json.loads(data) for name, data in members(path) if name.endswith(".json")]
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def store_documents(path: Path, documents: list[Any]) -> None:
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(documents[0], protocol=2))
    elif path.suffix == ".tar":
        stored = iter(documents)
        changed = [
            (name, json.dumps(next(stored)).encode() if name.endswith(".json") else data)
            for name, data in members(path)
        ]
        write_tar(path, changed)
    elif path.suffix == ".jsonl":
        lines(path, *documents)
    else:
        write_json(path, documents[0])


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
