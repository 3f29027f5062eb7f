"""Question sets as their downloads look: the names of files, keys and types of the real ones, and their quirks."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.data.published_captions import picture
from tests.helpers.data.reading import write_json


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".png": "PNG", ".gif": "GIF"}.get(path.suffix, "JPEG")
        path.write_bytes(picture(40 * number, form))


def zip_folder(folder: Path, archive: Path, parts: list[str]) -> Path:
    """The named parts of a folder as a zip, with entries for its folders."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        for part in parts:
            for path in [folder / part, *sorted((folder / part).rglob("*"))]:
                stream.write(path, path.relative_to(folder))
    return archive


def annotators(answers: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": confidence, "answer_id": number}
        for number, (answer, confidence) in enumerate(answers, start=1)
    ]


def write_vqav2(folder: Path) -> None:
    head = {"info": {"version": "2.0"}, "license": {"name": "CC BY 4.0"}, "data_subtype": "train2014"}
    questions = [
        {"image_id": 262148, "question": "Is the rider wearing a helmet?", "question_id": 262148004},
        {"image_id": 262148, "question": "How many people?", "question_id": 262148005},
        {"image_id": 262149, "question": "What is this?", "question_id": 262149000},
        {"image_id": 42, "question": "Where is the picture?", "question_id": 42001},
    ]
    answers = {
        262148004: [("yes", "yes")] * 4 + [("no", "maybe")] * 6,
        262148005: [("2", "yes")] * 5 + [("two", "yes")] * 5,
        42001: [("lost", "yes")] * 10,
    }
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": max(given, key=given.count)[0],
            "answers": annotators(given),
            "image_id": question_id // 1000,
            "answer_type": "other",
            "question_id": question_id,
        }
        for question_id, given in answers.items()
    ]
    write_images(folder, [f"train2014/COCO_train2014_{262148:012d}.jpg", f"val2014/COCO_val2014_{262149:012d}.jpg"])
    write_json(
        folder / "v2_OpenEnded_mscoco_train2014_questions.json",
        {**head, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions},
    )
    write_json(folder / "v2_mscoco_train2014_annotations.json", {**head, "annotations": annotations})


def gqa_question(image: str, question: str, **answers: str) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "argument": "laptop (681267)", "dependencies": []}],
        "entailed": [],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "07-laptop_mug"},
        "types": {"detailed": "relVerify", "semantic": "rel", "structural": "verify"},
        "annotations": {"answer": {}, "question": {"2:5": "681267"}, "fullAnswer": {"2": "681267"}},
        "semanticStr": "select: laptop (681267)",
        **answers,
    }


def write_gqa(folder: Path) -> None:
    full = "No, the mug is to the right of the laptop."
    write_images(folder, ["images/2354786.jpg", "images/n161313.jpg"])
    questions = {
        "201307251": gqa_question("2354786", "Is the mug to the left of the laptop?", answer="no", fullAnswer=full),
        "01612": gqa_question("n161313", "What color is it?", answer="café au lait", fullAnswer="It is café au lait."),
        "777": gqa_question("2354786", "A question of the test split?"),
    }
    write_json(folder / "train_balanced_questions.json", questions)


def write_vgqa(folder: Path) -> None:
    def pair(number: int, image: int, question: str, answer: Any, old: bool) -> dict[str, Any]:
        objects = {"a_objects": [], "q_objects": []} if old else {"answer_objects": [], "question_objects": []}
        return {**objects, "question": question, "image_id": image, "qa_id": number, "answer": answer}

    write_images(folder, ["VG_100K_2/1.jpg", "VG_100K/2.jpg"])
    documents = [
        {"id": 1, "qas": [pair(986801, 1, "What colour is the awning?", "Blue.", True)]},
        {"image_id": 2, "qas": [pair(986802, 2, "How many?", "Two.", False), pair(986803, 2, "Who?", None, False)]},
        {"id": 3, "qas": []},
        {"id": 4},
        {"id": 5, "qas": [pair(986804, 5, "Where?", "Nowhere.", True)]},
    ]
    write_json(folder / "question_answers.json", documents)


def write_dvqa(folder: Path) -> None:
    def row(number: int, question: str, answer: str, kind: str, box: list[float]) -> dict[str, Any]:
        image = "bar_train_00000317.png"
        names = {"question_type": kind, "bbox_answer": box, "question_id": f"00000317_{number}"}
        return {"question": question, "answer": answer, "image": image, **names}

    write_images(folder, ["images/bar_train_00000317.png"])
    rows = [
        row(5, "How many bars have values smaller than 4?", "two", "data", []),
        row(6, "What is the value of the largest bar?", "8", "data", [37.5, 10, 20, 9.5]),
        row(7, "What is the label of the first bar?", "", "structure", []),
    ]
    write_json(folder / "train_qa.json", rows)


def write_ocr_vqa(folder: Path) -> None:
    def book(split: int, url: str, questions: list[Any], answers: list[Any]) -> dict[str, Any]:
        title = {"title": 'The "Best" Calendar', "authorName": "Sandra B.", "genre": "Calendars"}
        return {"imageURL": url, "questions": questions, "answers": answers, **title, "split": split}

    write_images(folder, ["images/0761183272X.jpg", "images/B000.gif"])
    books = {
        "0761183272X": book(
            1, "http://ecx.ex/I/61Y5.jpg", ["Who wrote this book?", "Is this a games book?"], ["Sandra B.", "No"]
        ),
        "B000": book(1, "http://ecx.ex/I/7.gif", ["What is the title?"], ['The "Best" Calendar', "too many"]),
        "B001": book(3, "http://ecx.ex/I/8.jpg", ["Who wrote this book?", "What is the title?"], ["X", "Y"]),
        "B002": book(1, "http://ecx.ex/I/dead.jpg", ["Who wrote this book?"], ["Nobody"]),
    }
    write_json(folder / "dataset.json", books)


def write_docvqa(folder: Path, *, with_types: bool = False) -> None:
    def row(number: int, question: str, page: int, **answers: Any) -> dict[str, Any]:
        document = {"image": f"documents/pybv0228_{page}.png", "docId": 14465, "ucsf_document_id": "pybv0228"}
        kind = {"question_types": ["form"]} if with_types else {"data_split": "train"}
        names = {"questionId": number, "question": question, "ucsf_document_page_no": str(page)}
        return {**names, **document, **kind, **answers}

    write_images(folder, ["documents/pybv0228_81.png"])
    rows = [
        row(49153, "What is the invoice no.?", 81, answers=["A-117", "a-117"]),
        row(49154, "What is the date?", 81),
        row(49155, "What is on the missing page?", 82, answers=["?"]),
    ]
    head = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "train"}
    write_json(folder / ("train_v1.0_withQT.json" if with_types else "train_v1.0.json"), {**head, "data": rows})


def write_textvqa(folder: Path) -> None:
    answers = ["dakota digital", "dakota", "dakota", "clos", "dakota", *["dakota digital"] * 4, "dakota"]
    row = {
        "question": "what brand is printed on the cup?",
        "image_id": "003a8ae2ef43b999",
        "image_classes": ["Coffee cup"],
        "flickr_original_url": "https://f.ex/o.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": answers,
        "question_tokens": ["what", "brand"],
        "question_id": 34602,
        "set_name": "val",
    }
    tied = {**row, "question_id": 34603, "answers": ["b", "a", "a", "b"], "question": "which letter?"}
    test = {name: value for name, value in row.items() if name != "answers"} | {"question_id": 34604}
    write_images(folder, ["train_images/003a8ae2ef43b999.jpg"])
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": [row, tied, test]})


def write_chartqa(folder: Path) -> Path:
    """The folder of one split; its parent has a blank in its name."""
    split = folder / "ChartQA Dataset" / "train"
    write_images(split, ["png/41699051009999.png", "png/8127.png"])
    rows = [
        {"imgname": "41699051009999.png", "query": "What is the difference between Lamb and Corn??", "label": "0.57"},
        {"imgname": "8127.png", "query": "Which years\ufffd?", "label": "[2000, 2005]"},
        {"imgname": "8127.png", "query": "What share?", "label": "62"},
        {"imgname": "../8127.png", "query": "Is it outside?", "label": "Yes"},
    ]
    write_json(split / "train_human.json", rows)
    return split


AI2D_QUESTIONS: Mapping[str, dict[str, Any]] = {
    "0.png": {
        "What do fish eat?": {
            "abcLabel": False,
            "answerTexts": ["algae", "sun", "algae", "{}"],
            "correctAnswer": 1,
            "questionId": "0.png-0",
        }
    },
    "12.png": {
        "Which label marks the stem?": {
            "abcLabel": True,
            "answerTexts": ["A", "C", "B", "{}"],
            "correctAnswer": 1,
            "questionId": "12.png-3",
        },
        "Which is none?": {"abcLabel": False, "answerTexts": ["{}", "x"], "correctAnswer": 0, "questionId": "12.png-4"},
        "Which is fifth?": {"abcLabel": False, "answerTexts": ["x"], "correctAnswer": 4, "questionId": "12.png-5"},
    },
    "30.png": {
        "In the test split?": {
            "abcLabel": False,
            "answerTexts": ["y", "n"],
            "correctAnswer": 0,
            "questionId": "30.png-0",
        }
    },
}


def write_ai2d(folder: Path) -> None:
    """ai2d/ with its three folders, and the list of the test split beside it."""
    root = folder / "ai2d"
    write_images(root, [f"images/{name}" for name in AI2D_QUESTIONS])
    for part in ("questions", "annotations"):
        (root / part).mkdir()
    for name, questions in AI2D_QUESTIONS.items():
        write_json(root / "questions" / f"{name}.json", {"imageName": name, "questions": questions})
        stem = {"id": "T0", "value": "stem", "replacementText": "c", "rectangle": [[4, 4], [20, 16]]}
        flat = {**stem, "id": "T1", "rectangle": [[4, 9], [20, 9]]}
        parts: dict[str, Any] = {"arrowHeads": {}, "arrows": {}, "blobs": {}, "relationships": {}}
        write_json(root / "annotations" / f"{name}.json", {**parts, "text": {"T0": stem, "T1": flat}})
    (folder / "ai2d_test_ids.csv").write_text("30\n31\n", encoding="utf-8")


def write_all(folder: Path) -> None:
    """Every question set in a folder of its own."""
    for name, write in {
        "vqav2": write_vqav2,
        "gqa": write_gqa,
        "vg": write_vgqa,
        "dvqa": write_dvqa,
        "ocr_vqa": write_ocr_vqa,
        "docvqa": write_docvqa,
        "textvqa": write_textvqa,
        "chartqa": write_chartqa,
        "ai2d": write_ai2d,
    }.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)


def lone_surrogate(path: Path, text: str) -> None:
    """Replace a text of a JSON file by an escape that is half a character."""
    data = path.read_text(encoding="utf-8")
    assert json.dumps(text) in data
    path.write_text(data.replace(json.dumps(text), '"\\ud83d"'), encoding="utf-8")
