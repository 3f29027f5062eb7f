"""Question sets in their published forms: golden samples, and an account of every question that was read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.ai2d import paint_letters
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.registry import build_source
from megatron_vl.data.sources.vqa import best_answer
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data import published_vqa as published
from tests.helpers.data.published_captions import picture
from tests.helpers.data.published_vqa import zip_folder
from tests.helpers.data.reading import kept, read_all, reasons, write_json

Golden = list[tuple[str, str, str]]


def source_of(type_name: str, folder: Path, **options: Any) -> Source:
    return build_source({"name": "set", "type": type_name, **options}, where="recipe", root=folder)


def golden(items: list[Sample | Skipped]) -> Golden:
    assert {(s.task, s.language, s.source, len(s.images)) for s in kept(items)} <= {("vqa", "en", "set", 1)}
    return [(s.question, s.text, s.images[0].key) for s in kept(items)]


COCO = "{0}2014/COCO_{0}2014_{1:012d}.jpg"
VQAV2 = {
    "questions": "v2_OpenEnded_mscoco_train2014_questions.json",
    "annotations": "v2_mscoco_train2014_annotations.json",
}
AI2D = {"path": "ai2d", "test_ids": "ai2d_test_ids.csv"}
SETS: dict[str, tuple[Callable[[Path], Any], dict[str, str], Golden, dict[str, int]]] = {
    "vqav2": (
        published.write_vqav2,
        {**VQAV2, "image_root": "."},
        [
            ("Is the rider wearing a helmet?", "yes", COCO.format("train", 262148)),
            ("How many people?", "2", COCO.format("train", 262148)),
        ],
        {"no_annotation": 1, "missing_image": 1},
    ),
    "gqa": (
        published.write_gqa,
        {"questions": "train_balanced_questions.json", "image_root": "."},
        [
            ("Is the mug to the left of the laptop?", "no", "images/2354786.jpg"),
            ("What color is it?", "café au lait", "images/n161313.jpg"),
        ],
        {"missing_field": 1},
    ),
    "vgqa": (
        published.write_vgqa,
        {"questions": "question_answers.json", "image_root": "."},
        [("What colour is the awning?", "Blue.", "VG_100K_2/1.jpg"), ("How many?", "Two.", "VG_100K/2.jpg")],
        {"no_annotation": 1, "missing_field": 1, "missing_image": 1},
    ),
    "dvqa": (
        published.write_dvqa,
        {"questions": "train_qa.json", "image_root": "."},
        [
            ("How many bars have values smaller than 4?", "two", "images/bar_train_00000317.png"),
            ("What is the value of the largest bar?", "8", "images/bar_train_00000317.png"),
        ],
        {"no_annotation": 1},
    ),
    "ocr_vqa": (
        published.write_ocr_vqa,
        {"questions": "dataset.json", "image_root": "."},
        [
            ("Who wrote this book?", "Sandra B.", "images/0761183272X.jpg"),
            ("Is this a games book?", "No", "images/0761183272X.jpg"),
            ("What is the title?", 'The "Best" Calendar', "images/B000.gif"),
        ],
        {"wrong_field": 1, "other_split": 2, "missing_image": 1},
    ),
    "docvqa": (
        published.write_docvqa,
        {"questions": "train_v1.0.json", "image_root": "."},
        [("What is the invoice no.?", "A-117", "documents/pybv0228_81.png")],
        {"missing_field": 1, "missing_image": 1},
    ),
    "textvqa": (
        published.write_textvqa,
        {"questions": "TextVQA_0.5.1_val.json", "image_root": "."},
        [
            ("what brand is printed on the cup?", "dakota digital", "train_images/003a8ae2ef43b999.jpg"),
            ("which letter?", "b", "train_images/003a8ae2ef43b999.jpg"),
        ],
        {"missing_field": 1},
    ),
    "chartqa": (
        published.write_chartqa,
        {"questions": "ChartQA Dataset/train/train_human.json", "image_root": "ChartQA Dataset/train"},
        [
            ("What is the difference between Lamb and Corn??", "0.57", "png/41699051009999.png"),
            ("Which years\ufffd?", "[2000, 2005]", "png/8127.png"),
            ("What share?", "62", "png/8127.png"),
        ],
        {"missing_image": 1},
    ),
    "ai2d": (
        published.write_ai2d,
        AI2D,
        [
            ("What do fish eat?\nOptions: A. algae\nB. sun", "sun", "images/0.png"),
            ("Which label marks the stem?\nOptions: A. A\nB. C\nC. B", "C", "images/12.png#letters"),
        ],
        {"no_annotation": 2, "other_split": 1},
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_golden_samples(tmp_path: Path, name: str) -> None:
    write, options, samples, lost = SETS[name]
    write(tmp_path)
    items = read_all(source_of(name, tmp_path, **options))
    assert golden(items) == samples
    assert reasons(items) == lost
    assert len({item.key for item in items}) == len(items), "keys are unique"


@pytest.mark.parametrize("name", SETS)
def test_samples_do_not_depend_on_the_size_of_shards(tmp_path: Path, name: str) -> None:
    write, options, _, _ = SETS[name]
    write(tmp_path)
    whole = read_all(source_of(name, tmp_path, **options))
    small = source_of(name, tmp_path, **options, records_per_shard=1)
    assert len(small.shards()) > 1
    assert read_all(small) == whole


# what differs by set


def test_gqa_may_learn_full_answers(tmp_path: Path) -> None:
    published.write_gqa(tmp_path)
    source = source_of("gqa", tmp_path, **SETS["gqa"][1], answer_field="fullAnswer")
    assert [s.text for s in kept(read_all(source))] == [
        "No, the mug is to the right of the laptop.",
        "It is café au lait.",
    ]


def test_gqa_in_a_folder_of_ten_files(tmp_path: Path) -> None:
    published.write_gqa(tmp_path)
    for number in range(2):
        record = published.gqa_question("2354786", f"question {number}?", answer="yes")
        (tmp_path / "train_all_questions").mkdir(exist_ok=True)
        write_json(tmp_path / "train_all_questions" / f"train_all_questions_{number}.json", {f"00{number}": record})
    items = read_all(source_of("gqa", tmp_path, questions="train_all_questions", image_root="."))
    assert [(s.key, s.question) for s in kept(items)] == [
        ("train_all_questions_0.json#000", "question 0?"),
        ("train_all_questions_1.json#001", "question 1?"),
    ]


def test_every_annotator_is_heard_where_several_were_asked(tmp_path: Path) -> None:
    published.write_vqav2(tmp_path)
    published.write_textvqa(tmp_path)
    published.write_docvqa(tmp_path)
    found = {
        name: [sample.annotators for sample in kept(read_all(source_of(name, tmp_path, **SETS[name][1])))]
        for name in ("vqav2", "textvqa", "docvqa")
    }
    assert found["vqav2"] == [("yes",) * 4 + ("no",) * 6, ("2",) * 5 + ("two",) * 5]
    assert [len(said) for said in found["textvqa"]] == [10, 4]
    assert found["docvqa"] == [()], "several answers there are equally right"


def test_vgqa_may_learn_answers_without_their_period(tmp_path: Path) -> None:
    published.write_vgqa(tmp_path)
    items = read_all(source_of("vgqa", tmp_path, **SETS["vgqa"][1], strip_period=True))
    assert [(s.key, s.text) for s in kept(items)] == [("question 986801", "Blue"), ("question 986802", "Two")]


def test_ocr_vqa_reads_the_split_that_is_asked_for(tmp_path: Path) -> None:
    published.write_ocr_vqa(tmp_path)
    published.write_images(tmp_path, ["images/B001.jpg"])
    items = read_all(source_of("ocr_vqa", tmp_path, **SETS["ocr_vqa"][1], splits="3"))
    assert [(s.key, s.text) for s in kept(items)] == [("dataset.json#B001.0", "X"), ("dataset.json#B001.1", "Y")]
    assert reasons(items) == {"other_split": 5}


def test_docvqa_with_types_of_questions(tmp_path: Path) -> None:
    published.write_docvqa(tmp_path, with_types=True)
    items = read_all(source_of("docvqa", tmp_path, questions="train_v1.0_withQT.json", image_root="."))
    assert golden(items) == SETS["docvqa"][2]


def test_ai2d_paints_letters_where_the_question_speaks_of_them(tmp_path: Path) -> None:
    published.write_ai2d(tmp_path)
    plain, lettered = kept(read_all(source_of("ai2d", tmp_path, **AI2D)))
    assert plain.images[0].data == (tmp_path / "ai2d" / "images" / "0.png").read_bytes()
    before = Image.open(tmp_path / "ai2d" / "images" / "12.png").convert("RGB")
    after = Image.open(io.BytesIO(lettered.images[0].data))
    assert (after.size, after.getpixel((4, 4)), after.getpixel((6, 6))) == (before.size, (0, 0, 0), (255, 255, 255))
    assert after.getpixel((30, 20)) == before.getpixel((30, 20))
    inside = [after.getpixel((x, y)) for x in range(6, 19) for y in range(6, 15)]
    assert min(map(sum, inside)) < 300, "a letter is drawn in the box"


def test_ai2d_without_options_and_the_test_split(tmp_path: Path) -> None:
    published.write_ai2d(tmp_path)
    bare = source_of("ai2d", tmp_path, **AI2D, with_options=False)
    assert [(s.question, s.text) for s in kept(read_all(bare))][0] == ("What do fish eat?", "sun")
    test = read_all(source_of("ai2d", tmp_path, **AI2D, split="test"))
    assert [s.question for s in kept(test)] == ["In the test split?\nOptions: A. y\nB. n"]
    assert reasons(test) == {"other_split": 4}


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (None, "no_annotation"),
        ("{", "bad_json"),
        ({"blobs": {}}, "missing_field"),
        ({"text": {"T0": {"replacementText": "A", "rectangle": [[1, 2], [3]]}}}, "bad_box"),
        ({"text": {"T0": {"replacementText": "A", "rectangle": [[1, 2], [3, float("nan")]]}}}, "bad_box"),
    ],
)
def test_ai2d_annotations_that_cannot_be_painted(tmp_path: Path, annotation: Any, reason: str) -> None:
    published.write_ai2d(tmp_path)
    path = tmp_path / "ai2d" / "annotations" / "12.png.json"
    path.unlink() if annotation is None else path.write_text(
        annotation if annotation == "{" else json.dumps(annotation)
    )
    items = read_all(source_of("ai2d", tmp_path, **AI2D))
    assert len(kept(items)) == 1
    assert reasons(items) == {"other_split": 1} | ({reason: 1} if reason != "no_annotation" else {}) | {
        "no_annotation": 3 if reason == "no_annotation" else 2
    }


def test_a_box_far_outside_the_image_costs_no_memory() -> None:
    from megatron_vl.data.sample import ImageRef

    annotation = {"text": {"T0": {"replacementText": "A", "rectangle": [[-1e9, -1e9], [1e9, 1e9]]}}}
    painted = paint_letters(ImageRef("x", picture(3, "PNG")), annotation)
    assert Image.open(io.BytesIO(painted.data)).getpixel((1, 1)) == (255, 255, 255)


# answers


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("cat", "maybe"), ("cat", "maybe"), ("cat", "maybe"), ("dog", "yes")], "cat"),
        ([("cat", "maybe"), ("dog", "yes")], "dog"),
        ([("cat", "no"), ("cat", "no"), ("dog", "no")], "cat"),
        ([("dog", "yes"), ("cat", "yes")], "dog"),
    ],
)
def test_best_answer_goes_by_confidence_then_frequency_then_order(answers: list[Any], expected: str) -> None:
    assert best_answer({"answers": published.annotators(answers)}) == expected


def test_best_answer_falls_back_to_the_multiple_choice_answer() -> None:
    assert best_answer({"multiple_choice_answer": "two"}) == "two"
    assert best_answer({"answers": [], "multiple_choice_answer": "two"}) == "two"
    with pytest.raises(SkipSample, match="no_annotation"):
        best_answer({"answers": [], "multiple_choice_answer": ["two"]})
    with pytest.raises(SkipSample, match="missing_field"):
        best_answer({"multiple_choice_answer": None})
    with pytest.raises(SkipSample, match="wrong_field"):
        best_answer({"answers": [[3]]})


def test_a_bad_annotation_is_the_fault_of_its_question(tmp_path: Path) -> None:
    published.write_vqav2(tmp_path)
    path = tmp_path / VQAV2["annotations"]
    document = json.loads(path.read_text())
    document["annotations"][0]["answers"] = [{"answer": None}]
    document["annotations"] += ["nonsense", {"no": "id"}]
    write_json(path, document)
    items = read_all(source_of("vqav2", tmp_path, **SETS["vqav2"][1]))
    assert [s.key for s in kept(items)] == ["question 262148005"]
    assert reasons(items) == {"wrong_field": 1, "no_annotation": 1, "missing_image": 1}


# files that are damaged or hostile


def test_questions_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    published.write_textvqa(tmp_path)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    document = json.loads(path.read_text())
    row = document["data"][0]
    changes: list[tuple[Any, str]] = [
        ("nonsense", "wrong_field"),
        ({**row, "question": None}, "wrong_field"),
        ({**row, "question": "  "}, "empty_text"),
        ({**row, "question": "half \ud83d"}, "bad_unicode"),
        ({**row, "answers": ["half \ud83d"]}, "bad_unicode"),
        ({**row, "answers": None}, "no_annotation"),
        ({**row, "answers": {"0": "a"}}, "wrong_field"),
        ({**row, "image_id": "none"}, "missing_image"),
        ({**row, "image_id": "../../secret"}, "image_outside_root"),
        ({**row, "image_id": 7.5}, "wrong_field"),
        ({**row, "image_id": "a\0b"}, "bad_image_path"),
        ({name: value for name, value in row.items() if name != "image_id"}, "missing_field"),
    ]
    write_json(path, {**document, "data": [row, *(change for change, _ in changes)]})
    items = read_all(source_of("textvqa", tmp_path, **SETS["textvqa"][1]))
    assert len(kept(items)) == 1
    assert [item.reason for item in items if isinstance(item, Skipped)] == [reason for _, reason in changes]


@pytest.mark.parametrize("name", sorted(set(SETS) - {"ai2d"}))
def test_a_cut_document_is_refused_before_any_question_is_used(tmp_path: Path, name: str) -> None:
    write, options, _, _ = SETS[name]
    write(tmp_path)
    path = tmp_path / options["questions"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"not valid JSON \(.* at byte \d+\); is the file complete"):
        source_of(name, tmp_path, **options).shards()


def test_a_cut_file_of_annotations_is_refused_before_any_question_is_used(tmp_path: Path) -> None:
    published.write_vqav2(tmp_path)
    path = tmp_path / VQAV2["annotations"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="annotations.json: not valid JSON"):
        source_of("vqav2", tmp_path, **SETS["vqav2"][1]).shards()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "none.json"}, r"none\.json: no such file"),
        ({"questions": "empty"}, r"empty: no \.json file in this folder"),
        ({"image_root": "none"}, "none: no such folder"),
        ({"image_pattern": ["{image_id}.jpg", "{0}.jpg"]}, r"'\{0\}\.jpg' names no field"),
        ({"records": "rows"}, r"expected a list under 'rows'; found the keys .*'data'"),
        ({"records_per_shard": 0}, "records_per_shard is 0"),
    ],
)
def test_files_that_are_missing_or_of_another_shape_are_named(tmp_path: Path, options: Any, message: str) -> None:
    published.write_textvqa(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        source_of("textvqa", tmp_path, **{**SETS["textvqa"][1], **options}).shards()


# zips as downloaded


@pytest.mark.parametrize(
    ("name", "parts", "archives", "options"),
    [
        ("gqa", ["images"], "images.zip", {}),
        ("gqa", ["train_balanced_questions.json"], "questions1.2.zip", {"questions": "train_balanced_questions.json"}),
        ("textvqa", ["train_images"], "train_val_images.zip", {}),
        ("vgqa", ["question_answers.json"], "question_answers.json.zip", {"questions": "question_answers.json"}),
        ("ai2d", ["ai2d"], "ai2d-all.zip", {"path": "ai2d"}),
    ],
)
def test_zips_are_read_in_place(
    tmp_path: Path, name: str, parts: list[str], archives: str, options: dict[str, str]
) -> None:
    write, plain, samples, lost = SETS[name]
    write(tmp_path)
    zip_folder(tmp_path, tmp_path / archives, parts)
    for part in parts:
        (tmp_path / part).rename(tmp_path / "unused")
    inside = {key: f"{archives}/{value}" for key, value in options.items()}
    items = read_all(source_of(name, tmp_path, **{**plain, **inside}))
    assert golden(items) == [(q, a, image if name in ("vgqa", "ai2d") or options else f"{archives}/{image}")
                             for q, a, image in samples]  # fmt: skip
    assert reasons(items) == lost
