"""Grounding: RefCOCO's pickles, MDETR's json of the same expressions, Visual Genome's regions, GRIT's phrases."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.formats.pickles import load_plain_pickle
from megatron_vl.data.sources.boxes import overlap
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.refcoco import RefCOCO, evaluation_images
from megatron_vl.data.sources.refexp import RefExp
from megatron_vl.data.sources.visual_genome import VisualGenome
from megatron_vl.errors import DataError
from tests.helpers.data.published_grounding import ANNOTATIONS, Python2Pickler, write_refcoco
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_json, write_tar

# RefCOCO


GOLDEN = [
    ("refs(unc).p#train0.0", "lady in blue", (0.25, 0.5, 0.75, 0.75)),
    ("refs(unc).p#train0.1", "left one", (0.25, 0.5, 0.75, 0.75)),
    ("refs(unc).p#train1.0", "café sign", (0.0, 0.0, 0.1, 0.1)),
    ("refs(unc).p#train1.1", "招牌", (0.0, 0.0, 0.1, 0.1)),
    ("refs(unc).p#train6.0", "negative corner, beyond the edge", (0.0, 0.9375, 0.1, 1.0)),
]


def test_refcoco_gives_a_sample_for_each_sentence(tmp_path: Path) -> None:
    source = write_refcoco(tmp_path)
    items = read_all(source)
    assert [(s.key, s.question, s.regions[0].text) for s in kept(items)] == [(k, text, text) for k, text, _ in GOLDEN]
    for sample, (_, _, box) in zip(kept(items), GOLDEN, strict=True):
        assert sample.regions[0].boxes[0] == pytest.approx(box)
        assert (sample.task, sample.images[0].key) == ("referring", "COCO_train2014_000000581857.jpg")
    assert reasons(items) == {"empty_text": 2, "missing_field": 1, "no_annotation": 2, "bad_box": 1}
    assert [shard.name for shard in source.shards()] == ["refs(unc).p:0", "refs(unc).p:3", "refs(unc).p:6"]


def test_refcoco_reads_other_splits_and_the_other_direction(tmp_path: Path) -> None:
    source = write_refcoco(tmp_path)
    other = RefCOCO("r", source.path, source.image_root, task="region_caption", expression="raw")
    assert kept(read_all(other))[0].text == "LADY in blue"
    test = RefCOCO("r", source.path, source.image_root, split="testA")
    assert reasons(read_all(test)) == {"no_annotation": 1}
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: no reference has split 'val'; found testA, train"):
        RefCOCO("r", source.path, source.image_root, split="val").shards()
    message = r"refs\(umd\)\.p: no such file; the folder holds refs\(unc\)\.p\. .*split_by, here 'umd'"
    with pytest.raises(DataError, match=message):
        RefCOCO("r", source.path, source.image_root, split_by="umd").shards()
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: no such file$"):
        RefCOCO("r", tmp_path, source.image_root).shards()


def test_refcoco_and_mdetr_agree(tmp_path: Path) -> None:
    source = write_refcoco(tmp_path)
    base = {"file_name": "COCO_train2014_000000581857.jpg", "height": 640, "width": 427, "original_id": 581857}
    images, annotations = [], []
    for _, text, _ in GOLDEN:
        annotation = {"café sign": 1, "招牌": 1, "negative corner, beyond the edge": 3}.get(text, 0)
        images.append({**base, "id": len(images), "caption": text, "dataset_name": "refcoco"})
        annotations.append({"image_id": len(annotations), "bbox": ANNOTATIONS[annotation]["bbox"], "iscrowd": 0})
    path = write_json(tmp_path / "finetune_refcoco_train.json", {"images": images, "annotations": annotations})
    mdetr = kept(read_all(RefExp("m", path, source.image_root)))
    refer = kept(read_all(source))
    assert [(s.question, s.regions, s.images) for s in mdetr] == [(s.question, s.regions, s.images) for s in refer]


class Attack:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_anything_is_refused_before_it_does(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "refs(unc).p", tmp_path / "mark"
    for call, argument in ((Path.touch, mark), (eval, f"open({str(mark)!r}, 'w')"), (list, (1, 2))):
        path.write_bytes(pickle.dumps([{"split": Attack(call, argument)}], protocol))
        with pytest.raises(DataError, match=r"refs\(unc\)\.p: the pickle asks for .*do not use it"):
            load_plain_pickle(path)
    assert not mark.exists()
    assert pickle.loads(path.read_bytes()) == [{"split": [1, 2]}], "it would have run"  # noqa: S301


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"\x80\x02P1\n.",
        b"\x82\x01.",
        b"not a pickle",
        b"",
        pickle.dumps([{"split": "train"}])[:-3],
        b"\x80\x02]q\x00r\xff\xff\xff\x7f.",
        b"h\x07.",
        b"R.",
        b"}(K\x01b.",
        b"\x80\x02U\x05ab",
    ],
)
def test_other_pickles_are_refused_with_their_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "refs(unc).p").write_bytes(data)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p"):
        load_plain_pickle(tmp_path / "refs(unc).p")


def test_a_pickle_of_something_else_is_named(tmp_path: Path) -> None:
    for value in ({"a": 1}, [1], [{"no": "split"}]):
        (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="expected a list of references"):
            RefCOCO("r", tmp_path, tmp_path).shards()


# Visual Genome


def write_visual_genome(folder: Path, **options: Any) -> VisualGenome:
    for name in ("VG_100K/2.jpg", "VG_100K_2/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(JPEG)
    url = "https://cs.stanford.edu/people/rak248/"
    size = {"width": 800, "height": 600, "flickr_id": None}
    images = [
        {**size, "url": f"{url}VG_100K_2/1.jpg", "image_id": 1, "coco_id": None},
        {**size, "url": f"{url}VG_100K/2.jpg", "id": 2, "coco_id": 98304},
        {**size, "url": f"{url}VG_100K/3.jpg", "image_id": 3, "coco_id": None},
    ]

    def region(phrase: Any, *xywh: Any, **other: Any) -> dict[str, Any]:
        return {
            "region_id": 9,
            **dict(zip(("x", "y", "width", "height"), xywh, strict=True)),
            "phrase": phrase,
            **other,
        }

    clock = region("the clock is green\n in colour ", 400, 60, 80, 120, image_id=1)
    first = [
        clock,
        region("a tree", -8, -6, 80, 120),
        region("nothing", 10, 10, 0, 20),
        region("beyond", 800, 10, 20, 20),
        region("The clock is green in colour", 402, 60, 80, 120),
        region("the clock is green in colour", 100, 60, 80, 120),
        region(None, 0, 0, 9, 9),
        region("", 0, 0, 9, 9),
        region("a string", "0", 0, 9, 9),
        "no object",
    ]
    records = [
        {"id": 1, "regions": first},
        {"image_id": 2, "regions": [clock]},
        {"id": 3, "regions": [clock, clock]},
        {"id": 4, "regions": [clock]},
        {"id": 5},
    ]
    regions = write_json(folder / "region_descriptions.json", records)
    return VisualGenome("vg", regions, write_json(folder / "image_data.json", images), folder, **options)


def test_visual_genome_gives_regions_and_counts_the_others(tmp_path: Path) -> None:
    items = read_all(write_visual_genome(tmp_path, records_per_shard=2))
    green = "the clock is green in colour"
    assert [(s.key, s.question, s.images[0].key) for s in kept(items)] == [
        ("region_descriptions.json#0.0", green, "VG_100K_2/1.jpg"),
        ("region_descriptions.json#0.1", "a tree", "VG_100K_2/1.jpg"),
        ("region_descriptions.json#0.5", green, "VG_100K_2/1.jpg"),
        ("region_descriptions.json#1.0", green, "VG_100K/2.jpg"),
    ]
    assert [s.regions[0].boxes for s in kept(items)[:2]] == [((0.5, 0.1, 0.6, 0.3),), ((0.0, 0.0, 0.09, 0.19),)]
    assert reasons(items) == {
        "bad_box": 2,
        "duplicate_region": 1,
        "wrong_field": 3,
        "empty_text": 1,
        "missing_image": 3,
        "missing_field": 1,
    }
    other = kept(read_all(write_visual_genome(tmp_path, task="region_caption", duplicate_iou=1.0)))
    assert [(s.text, s.question) for s in other[:3]] == [(green, ""), ("a tree", ""), ("The" + green[3:], "")]


def test_visual_genome_without_the_images_that_refcoco_tests_on(tmp_path: Path) -> None:
    refcoco = write_refcoco(tmp_path)
    assert evaluation_images(refcoco.path.parent) == {98304}
    items = read_all(write_visual_genome(tmp_path, refcoco_root=refcoco.path.parent))
    assert reasons(items)["evaluation_image"] == 1
    assert "VG_100K/2.jpg" not in {sample.images[0].key for sample in kept(items)}
    with pytest.raises(DataError, match=r"found no \*/refs"):
        read_all(write_visual_genome(tmp_path, refcoco_root=refcoco.path))


def test_visual_genome_refuses_what_cannot_work(tmp_path: Path) -> None:
    source = write_visual_genome(tmp_path, duplicate_iou=1.5)
    with pytest.raises(DataError, match=r"duplicate_iou is 1\.5"):
        source.shards()
    write_json(source.images, [{"image_id": 1, "url": "x", "width": "800", "height": 600}])
    with pytest.raises(DataError, match=r"image_data\.json: element 0: width and height are '800' and 600"):
        read_all(dataclasses.replace(source, duplicate_iou=0.5))


def test_overlap_is_intersection_over_union() -> None:
    assert overlap((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)) == 1
    assert overlap((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)) == 0


# GRIT's phrases


def grit(folder: Path, task: str, **other: Any) -> GroundedCaption:
    meta = {
        "key": "000000012",
        "clip_similarity_vitb32": 0.3532,
        "url": "https://s.ex/c.jpg",
        "caption": "a wire hanger with a paper cover",
        "width": 1024,
        "height": 693,
        "ref_exps": [
            [19.0, 32.0, 0.02, 0.31, 0.96, 0.96, 0.793],
            [0.0, 32.0, 0.02, 0.03, 0.96, 0.97, 0.6752],
            [0.0, 13.0, 0.1, 0.1, 0.4, 0.4, 0.7],
            [19.0, 32.0, 0.5, 0.5, 0.6, 0.9, 0.9],
            [1.0, 2.0, 0.5, 0.5, 0.6, 0.9, 0.9],
        ],
        **other,
    }
    write_tar(folder / "00000.tar", [("000000012.jpg", JPEG), ("000000012.json", json.dumps(meta).encode())])
    return GroundedCaption("grit", folder, task=task)  # type: ignore[arg-type]


def test_grit_gives_phrases_and_names_the_nested_ones(tmp_path: Path) -> None:
    items = read_all(grit(tmp_path, "referring"))
    assert [(s.key, s.question, len(s.regions[0].boxes), s.text) for s in kept(items)] == [
        ("00000.tar/000000012#19-32", "a paper cover", 2, "")
    ]
    assert reasons(items) == {"empty_text": 1, "nested_phrase": 2}
    (region,) = kept(read_all(grit(tmp_path, "region_caption")))
    assert (region.task, region.text, region.question, region.regions[0].span) == (
        "region_caption",
        "a paper cover",
        "",
        None,
    )


@pytest.mark.parametrize(
    ("old", "new", "fits"),
    [
        ((1024, 693), (256, 173), True),
        ((1024, 693), (1024, 693), True),
        ((3, 1000), (1, 256), True),
        ((1024, 693), (256, 256), False),
        ((1024, 1000), (256, 256), False),
    ],
)
def test_a_padded_or_cropped_image_no_longer_fits_its_boxes(
    tmp_path: Path, old: tuple[int, int], new: tuple[int, int], fits: bool
) -> None:
    sides = {"width": new[0], "height": new[1], "original_width": old[0], "original_height": old[1]}
    items = read_all(grit(tmp_path, "grounded_caption", **sides))
    assert reasons(items) == ({} if fits else {"aspect_changed": 1})


def test_python_2_strings_are_bytes() -> None:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(["café", "招牌"])
    assert b"caf\xe9" in stream.getvalue() and "招牌".encode() in stream.getvalue()
