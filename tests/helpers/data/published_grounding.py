"""RefCOCO, TextVQA and LLaVA as their downloads look: names of files and folders, keys and types of the real ones.

``write_downloads`` lays out what ``examples/qwen_vl/data/README.md`` starts from.
"""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

from megatron_vl.data.sources.refcoco import RefCOCO
from tests.helpers.data.published_captions import picture
from tests.helpers.data.published_vqa import write_images, write_textvqa, zip_folder
from tests.helpers.data.reading import write_json


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]  # the one in Python can be told otherwise
    """Writes strings as Python 2 did: as bytes without an encoding."""

    def save_text(self, text: str) -> None:
        data = text.encode("latin-1" if "\xe9" in text else "utf-8")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, str: save_text}  # type: ignore[attr-defined]


def sentence(number: int, text: str) -> dict[str, Any]:
    return {"tokens": text.lower().split(), "raw": text, "sent_id": number, "sent": text.lower()}


def reference(number: int, split: str, *sentences: Any, **other: Any) -> dict[str, Any]:
    return {
        "sent_ids": list(range(len(sentences))),
        "file_name": f"COCO_train2014_000000581857_{number}.jpg",
        "ann_id": 1719310 + number,
        "ref_id": number,
        "image_id": 581857,
        "split": split,
        "sentences": list(sentences),
        "category_id": 1,
        **other,
    }


REFERENCES = [
    reference(0, "train", sentence(0, "LADY in blue"), sentence(1, "left one")),
    reference(1, "testA", sentence(2, "man"), image_id=98304),
    reference(2, "train", sentence(3, "café sign"), sentence(4, "招牌"), sentence(5, " "), {"sent_id": 6}),
    reference(3, "train", sentence(7, "no annotation"), ann_id=5),
    reference(0, "train", sentence(8, "no image"), image_id=7),
    reference(3, "train", sentence(9, "a box without area")),
    reference(0, "train"),
    reference(4, "train", sentence(10, "negative corner, beyond the edge")),
]
ANNOTATIONS = [
    {"id": 1719310, "bbox": [106.75, 320.0, 213.5, 160.0]},
    {"id": 1719312, "bbox": [0, 0, 42.7, 64]},
    {"id": 1719313, "bbox": [10, 10, 0, 20]},
    {"id": 1719314, "bbox": [-10.0, 600.0, 52.7, 100.0]},
]


def write_refcoco(folder: Path) -> RefCOCO:
    root, images = folder / "refer" / "data" / "refcoco", folder / "train2014"
    root.mkdir(parents=True)
    images.mkdir()
    (images / "COCO_train2014_000000581857.jpg").write_bytes(picture(90, size=(427, 640)))
    with (root / "refs(unc).p").open("wb") as stream:
        Python2Pickler(stream, protocol=2).dump(REFERENCES)
    outline = {"segmentation": [[0.5] * 8], "area": 1.5, "iscrowd": 0, "category_id": 1, "image_id": 581857}
    image = {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 640, "width": 427, "license": 1}
    document = {"info": {"year": 2014}, "images": [image], "annotations": [{**outline, **box} for box in ANNOTATIONS]}
    write_json(root / "instances.json", {**document, "licenses": [], "categories": [{"id": 1, "name": "person"}]})
    return RefCOCO("refcoco", root, images, records_per_shard=3)


def write_refer(folder: Path, name: str, split_by: str, num_references: int) -> None:
    """One of the refer toolkit's sets: two sentences to a reference; a sixth of the references are of other splits."""
    folder.joinpath(name).mkdir(parents=True)
    references, annotations, images = [], [], []
    for number in range(num_references):
        split = "val" if number % 6 == 5 else "train"
        sentences = sentence(2 * number, f"the {name} thing {number}"), sentence(2 * number + 1, f"number {number}")
        references.append(reference(number, split, *sentences, image_id=number))
        box = [4.0 + number % 3, 3.0, 10.5, 12.0]
        annotations.append({"id": 1719310 + number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
        file_name = f"COCO_train2014_{number:012d}.jpg"
        images.append({"id": number, "file_name": file_name, "width": 32, "height": 24, "license": 1})
    with (folder / name / f"refs({split_by}).p").open("wb") as stream:
        Python2Pickler(stream, protocol=2).dump(references)
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}
    write_json(folder / name / "instances.json", document)


def write_llava(folder: Path, num_dialogues: int) -> None:
    """LLaVA-Instruct-150K: the mark of the image first or last, several turns."""
    records = []
    for number in range(num_dialogues):
        question = "What is shown?\n<image>" if number % 2 else "<image>\nWhat is shown?"
        turns = [("human", question), ("gpt", f"Thing {number}."), ("human", "Is it grey?"), ("gpt", "Yes.")]
        conversation = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": f"{number:012d}", "image": f"{number:012d}.jpg", "conversations": conversation})
    folder.mkdir(parents=True)
    write_json(folder / "llava_instruct_150k.json", records)


def write_downloads(folder: Path, count: int = 24) -> None:
    """All three, zips as they come."""
    write_images(folder / "coco", [f"train2014/COCO_train2014_{number:012d}.jpg" for number in range(count)])
    write_images(folder / "coco", [f"train2017/{number:012d}.jpg" for number in range(count)])
    for name in ("train2014", "train2017"):
        zip_folder(folder / "coco", folder / "coco" / f"{name}.zip", [name])
        shutil.rmtree(folder / "coco" / name)
    for name, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        write_refer(folder / "refer", name, split_by, count)
    write_textvqa(folder / "textvqa")
    (folder / "textvqa" / "TextVQA_0.5.1_val.json").rename(folder / "textvqa" / "TextVQA_0.5.1_train.json")
    zip_folder(folder / "textvqa", folder / "textvqa" / "train_val_images.zip", ["train_images"])
    shutil.rmtree(folder / "textvqa" / "train_images")
    write_llava(folder / "llava", count)
