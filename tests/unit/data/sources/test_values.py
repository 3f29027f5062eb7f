"""Values as people's files have them: learned as the file says, or left out under a reason that says what they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.prompting.coordinates import parse_points
from megatron_vl.data.sources.boxes import box_from_corners, quad_from_points, shows_in_image
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.ocr import OCR
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from megatron_vl.data.sources.registry import build_source
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data.published_captions import picture
from tests.helpers.data.reading import JPEG, kept, qwen, read_all, reasons, write_json

# Tables: a header is declared, or certain


def table(folder: Path, text: str, columns: tuple[str, ...] = ("caption", "url"), **options: Any) -> list[Any]:
    (folder / "c.tsv").write_text(text, encoding="utf-8")
    for line in range(4):
        (folder / f"{line}.jpg").write_bytes(b"picture %d" % line)
    entry = {"name": "s", "type": "pairs", "path": "c.tsv", "image_root": ".", "image_pattern": "{line}.jpg"}
    return read_all(build_source({**entry, "columns": list(columns), **options}, where="here", root=folder))


def pairs_of(items: list[Any]) -> list[tuple[str, bytes]]:
    return [(sample.text, sample.images[0].data) for sample in kept(items)]


ROWS = "one\thttp://a.ex/1\ntwo\thttp://a.ex/2\n"
PAIRS = [("one", b"picture 0"), ("two", b"picture 1")]


@pytest.mark.parametrize(
    "address", ["//cdn.ex/0.jpg", "cdn.ex/0.jpg", "ftp://a.ex/0", "HTTPS://A.EX/0", "s3://b/0.jpg"]
)
def test_a_first_address_of_any_kind_keeps_its_picture(tmp_path: Path, address: str) -> None:
    found = pairs_of(table(tmp_path, f"zero\t{address}\n{ROWS}"))
    assert found == [("zero", b"picture 0"), ("one", b"picture 1"), ("two", b"picture 2")]


@pytest.mark.parametrize("header", ["caption\turl", "Caption\tURL", "\ufeffcaption\turl\r"])
def test_a_line_of_the_names_is_a_header(tmp_path: Path, header: str) -> None:
    assert pairs_of(table(tmp_path, f"{header}\n{ROWS}")) == PAIRS
    assert len(table(tmp_path, f"{header}\n{ROWS}", header=False)) == 3


@pytest.mark.parametrize(
    ("first", "doubt"),
    [
        ("TEXT\tIMAGE", "'url' is 'IMAGE', but in line 2 it is an address"),
        ("url\tcaption", "'url' is 'caption', but in line 2 it is an address"),
        ("a dog\t", "'url' is '', but in line 2 it is an address"),
        ("caption\tlink", "'caption' is the name of its column"),
        ("key\tcaption\turl", "expected 2 columns, found 3"),
    ],
)
def test_what_may_be_a_header_or_not_has_to_be_said(tmp_path: Path, first: str, doubt: str) -> None:
    with pytest.raises(DataError, match=f"c.tsv, line 1: {doubt}.*'header: true' or 'header: false'"):
        table(tmp_path, f"{first}\n{ROWS}")
    assert pairs_of(table(tmp_path, f"{first}\n{ROWS}", header=True)) == PAIRS
    assert pairs_of(table(tmp_path, f"{first}\n{ROWS}", header=False))[-1] == ("two", b"picture 2")


def test_columns_in_the_other_order_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'caption' is an address, 'http://a.ex/1'"):
        table(tmp_path, "http://a.ex/1\tone\nhttp://a.ex/2\ttwo\n")


def test_other_columns_tell_a_header_too(tmp_path: Path) -> None:
    columns = ("caption", "clip")
    with pytest.raises(DataError, match="'clip' is 'score', but in line 2 it is a number"):
        table(tmp_path, "words\tscore\none\t0.3\n", columns)
    assert pairs_of(table(tmp_path, "42\t0.3\nx\t0.2\n", columns)) == [("42", b"picture 0"), ("x", b"picture 1")]


def test_a_record_s_own_line_does_not_choose_its_picture(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"line": 3, "caption": "zero"}\n{"line": 0, "caption": "one"}\n')
    assert pairs_of(table(tmp_path, ROWS, path="c.jsonl")) == [("zero", b"picture 0"), ("one", b"picture 1")]


# Boxes and quads


PAGE = (100, 50)
QUADS: list[tuple[str, list[list[float]]]] = [
    ("beside the page", [[110, 5], [150, 5], [150, 20], [110, 20]]),
    ("below", [[10, 60], [40, 60], [40, 70], [10, 70]]),
    ("beside a corner", [[-10, 5], [5, -10], [-5, -20], [-20, -5]]),
    ("one point", [[10, 10]] * 4),
    ("a line", [[10, 10], [40, 20], [40, 20], [10, 10]]),
    ("touching the edge", [[100, 5], [120, 5], [120, 20], [100, 20]]),
    ("row by row", [[10, 10], [40, 10], [10, 20], [40, 20]]),
    ("not a number", [[10, 10], [40, 10], [40, float("nan")], [10, 20]]),
    ("huge", [[10, 10], [1e299, 10], [1e299, -1e299], [10, 1e299]]),
    ("other units", [[10, 10], [400, 10], [400, 20], [10, 20]]),
    ("three points", [[10, 10], [40, 10], [40, 20]]),
]


@pytest.mark.parametrize(("kind", "quad"), QUADS, ids=[kind for kind, _ in QUADS])
def test_a_quad_that_is_none_is_a_bad_quad(tmp_path: Path, kind: str, quad: list[list[float]]) -> None:
    with pytest.raises(SkipSample, match="bad_quad"):
        quad_from_points(quad, *PAGE)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    line = {"text": "word", "quad": [[10, 10], [40, 10], [40, 20], [10, 20]]}
    page = {"file_name": "a.jpg", "size": PAGE, "lines": [line, {**line, "quad": quad}]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(page) + "\n")
    assert reasons(read_all(OCR("o", tmp_path))) == {"bad_quad": 1}


@pytest.mark.parametrize("size", [[100.0, 50.0], [100, 50]])
def test_sizes_are_pixels_however_they_are_written(tmp_path: Path, size: list[float]) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    line = {"text": "word", "quad": [[10, 10], [40, 10], [40, 20], [10, 20]]}
    page = {"file_name": "a.jpg", "lines": [line]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**page, "size": size}) + "\n")
    assert kept(read_all(OCR("o", tmp_path)))[0].images[0].declared == (100, 50)
    for wrong in ([100.5, 50], [0, 50], [100, True], [100, None], [100], [100, float("inf")]):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**page, "size": wrong}) + "\n")
        assert reasons(read_all(OCR("o", tmp_path))) == {"bad_size": 1}


def test_a_quad_that_is_partly_on_the_page_is_clipped() -> None:
    points = [[-20, 10], [50, 10], [50, 60], [-20, 60]]
    assert quad_from_points(points, *PAGE) == (0, 0.2, 0.5, 0.2, 0.5, 1, 0, 1)
    assert quad_from_points(points[::-1], *PAGE) == (0, 1, 0.5, 1, 0.5, 0.2, 0, 0.2), "as published"
    whole = [[-5, -5], [200, -5], [200, 90], [-5, 90]]
    assert quad_from_points(whole, *PAGE) == (0, 0, 1, 0, 1, 1, 0, 1)
    diamond = [[50, -25], [125, 25], [50, 75], [-25, 25]]
    assert shows_in_image(diamond, *PAGE) and quad_from_points(diamond, *PAGE) == (0.5, 0, 1, 0.5, 0.5, 1, 0, 0.5)


@pytest.mark.parametrize(
    "corners",
    [
        (0, 0, 300, 200), (0.1, 0.1, 0.5, 2.5), (-2, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.9), (0.9, 0.1, 0.1, 0.9),
        (1, 0, 1.5, 1), (0, -0.5, 1, 0), (0, 0, float("inf"), 1), (0, 0, True, 1), (0, 0, "1", 1), (0, 0, 1),
    ],
)  # fmt: skip
def test_a_box_that_is_none_is_a_bad_box(corners: tuple[Any, ...]) -> None:
    with pytest.raises(SkipSample, match="bad_box"):
        box_from_corners(corners)
    assert box_from_corners((-0.1, 0.2, 1.3, 0.4)) == (0, 0.2, 1, 0.4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<box>(12,34),(1920,1080)</box>", "bad_box"),
        ("<box>(0,0),(1000,1000)</box>", "bad_box"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "bad_box"),
        ("<box>[12, 34, 56, 78]</box>", "bad_box"),
        ("<box>(-1,2),(3,4)</box>", "bad_box"),
        ("<box>(500,500),(100,600)</box>", "bad_box"),
        ("<box>(1,2),(3,4),(5,6),(7,8)</box>", "bad_box"),
        ("<box></box>", "bad_box"),
        ("<box>(1,2),(3,4)", "bad_box"),
        ("(1,2),(3,4)</box>", "bad_box"),
        ("<quad>(1,2),(3,4)</quad>", "bad_quad"),
        ("<quad>(1,2),(1,2),(1,2),(1,2)</quad>", "bad_quad"),
        ("<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", ""),
        ("<box>(1, 2), (3, 4)</box>", ""),
        ("<box>(7,7),(7,7)</box>", ""),
        ("<quad>(1,1),(3,1),(3,4),(1,4)</quad>", ""),
        ("(12,34),(1920,1080) without a tag", ""),
    ],
)
def test_boxes_in_chats_are_boxes_or_the_dialogue_is_left_out(tmp_path: Path, text: str, reason: str) -> None:
    assert reasons(qwen(tmp_path, "Where?", text)) == (Counter({reason: 1}) if reason else Counter())
    assert reasons(qwen(tmp_path, f"What is {text}?", "It")) == (Counter({reason: 1}) if reason else Counter())


def test_an_answer_may_close_the_box_of_its_question(tmp_path: Path) -> None:
    (sample,) = kept(qwen(tmp_path, "<ref>dog</ref><box>", "(1,2),(3,4)</box>"))
    assert sample.turns[1].text == "(1,2),(3,4)</box>"


# LLaVA's boxes


def llava(folder: Path, answer: Any, images: int = 1, **options: Any) -> list[Any]:
    (folder / "a.jpg").write_bytes(picture(5, size=(200, 100)))
    turns = [{"from": "human", "value": "<image>\n" * images + "Where?"}, {"from": "gpt", "value": answer}]
    path = write_json(folder / "l.json", [{"image": ["a.jpg"] * images, "conversations": turns}])
    return read_all(LLaVA("l", path, folder, **options))


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ("[0, 0.3, 1, 0.7]", "[0.0, 0.3, 1.0, 0.7]"),
        ("[0.00,0.30,1.00,0.70]", "[0.0, 0.3, 1.0, 0.7]"),
        ("[ 0., .3 ,\n1. , .700]", "[0.0, 0.3, 1.0, 0.7]"),
        ("[.25, .3, .5, 1]", "[0.25, 0.3, 0.5, 1.0]"),
        ("[1e-05, 3e-1, 1E0, 0.7]", "[0.0, 0.3, 1.0, 0.7]"),
        ("[0, 0.3, 1, +0.7]", "[0.0, 0.3, 1.0, 0.7]"),
        ("[0, 0, 0.5, 0.5]", "[0.0, 0.0, 0.5, 0.5]"),
    ],
)
def test_a_box_is_one_however_its_numbers_are_written(tmp_path: Path, written: str, same: str) -> None:
    (found,), (expected,) = kept(llava(tmp_path, f"At {written}.")), kept(llava(tmp_path, f"At {same}."))
    assert found.turns == expected.turns
    text = found.turns[1].text
    assert parse_points(text.removeprefix("At <box>").removesuffix("</box>."), 2) is not None


@pytest.mark.parametrize(
    "text",
    [
        "[1, 0, 0, 1]", "[0, 1, 2, 3]", "[12.5, 30.0, 200.0, 100.0]", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "(0.1, 0.2, 0.3, 0.4)", "0.1, 0.2, 0.3, 0.4", "[0.1 0.2 0.3 0.4]", "[10%, 20%, 30%, 40%]", "[a, 0.2, 0.3, 0.4]",
        "[2023, 0.5, 0.25, 0.75]", "[0.1; 0.2; 0.3; 0.4]", "[0..1, 0.2, 0.3, 0.4]", "[[0.1, 0.2], [0.3, 0.4]]",
    ],
)  # fmt: skip
def test_what_is_no_box_stays_text(tmp_path: Path, text: str) -> None:
    assert [sample.turns[1].text for sample in kept(llava(tmp_path, text))] == [text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[0, 0, 1, 1]", "ambiguous_box"),
        ("[0.5, 0.3, 1.01, 0.7]", "ambiguous_box"),
        ("[-0.01, 0.3, 0.9, 0.7]", "ambiguous_box"),
        ("[0.7, 0.3, 0.2, 0.6]", "bad_box"),
        ("[0.3, 0.3, 0.3, 0.3]", "bad_box"),
        ("[0.1, 0.0, 0.9, 0.2]", "bad_box"),
    ],
)
def test_what_may_be_a_box_or_not_is_left_out(tmp_path: Path, text: str, reason: str) -> None:
    assert reasons(llava(tmp_path, text)) == {reason: 1}
    assert len(kept(llava(tmp_path, text, convert_boxes=False))) == 1


def test_a_box_in_one_of_several_images_is_left_out(tmp_path: Path) -> None:
    assert reasons(llava(tmp_path, "[0.1, 0.3, 0.5, 0.7]", images=2)) == {"ambiguous_box": 1}
    assert reasons(llava(tmp_path, "[1, 2, 3, 4]", images=2)) == {}
    assert reasons(llava(tmp_path, "[0.1, 0.3, 0.5, 0.7]", images=0)) == {}


# The system turn


@pytest.mark.parametrize(
    "fields",
    [{"system": "Be brief."}, {"system_prompt": " Be brief.\n"}, {"system": "Be brief.", "system_prompt": None}],
)
def test_a_system_turn_beside_the_others_is_used(tmp_path: Path, fields: dict[str, Any]) -> None:
    (sample,) = kept(qwen(tmp_path, "Hi", "Hello", **fields))
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"),
    ]  # fmt: skip
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = write_json(tmp_path / "l.json", [{"conversations": turns, **fields}])
    assert kept(read_all(LLaVA("l", path, tmp_path)))[0].turns == sample.turns


def test_a_system_turn_among_the_others_is_used_if_it_is_the_first(tmp_path: Path) -> None:
    def read(*turns: tuple[str, Any], **fields: Any) -> list[Any]:
        record = {"conversations": [{"from": role, "value": value} for role, value in turns], **fields}
        return read_all(QwenVLChat("q", write_json(tmp_path / "q.json", [record]), tmp_path))

    system, spoken = ("system", "Be brief."), (("user", "Hi"), ("assistant", "Hello"))
    assert [turn.role for turn in kept(read(system, *spoken))[0].turns] == ["system", "user", "assistant"]
    assert len(kept(read(system, *spoken, system="Be brief."))) == 1
    assert reasons(read(*spoken, system)) == {"unknown_role": 1}
    assert reasons(read(system, *spoken, system="Be long.")) == {"wrong_field": 1}
    assert reasons(read(*spoken, system=["Be brief."])) == {"wrong_field": 1}
    assert reasons(read(*spoken, system="\ud800")) == {"bad_unicode": 1}
    assert kept(read(*spoken, system=None))[0].turns[0].role == "user"
    assert kept(read(*spoken, system=""))[0].turns[0] == kept(read(("system", ""), *spoken))[0].turns[0]


# Numbers where words are expected


NUMBERS = [(3, "3"), (0, "0"), (0.5, "0.5"), (-2, "-2"), (2.0, "2.0"), (1e-7, "0.0000001"), (1e22, "1" + 22 * "0")]
OTHERS: list[tuple[Any, str]] = [
    (True, "wrong_field"), (False, "wrong_field"), (float("nan"), "wrong_field"), (10**400, "wrong_field"),
    ({"x": 1}, "wrong_field"), ([[3]], "wrong_field"), (None, "no_annotation"), ("", "no_annotation"),
    ([], "no_annotation"), (" ", "empty_text"),
]  # fmt: skip


def ask(folder: Path, *records: dict[str, Any]) -> list[Any]:
    (folder / "0.jpg").write_bytes(JPEG)
    path = write_json(folder / "q.json", [{"image": "0.jpg", "question": "What?", **record} for record in records])
    return read_all(VQA("v", path, folder, records="", answer_field="answer", image_pattern=("{image}",)))


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_a_number_is_an_answer(tmp_path: Path, value: float, text: str) -> None:
    several = {"answer": [{"answer": value}, {"answer": "other"}, {"answer": value}]}
    records = {"answer": value}, {"answer": [value, "x", text]}, several, {"answer": "yes", "question": value}
    assert [sample.text for sample in kept(ask(tmp_path, *records))] == [text, text, text, "yes"]
    assert kept(ask(tmp_path, *records))[-1].question == text


@pytest.mark.parametrize(("value", "reason"), OTHERS)
def test_what_is_no_answer_is_left_out_as_what_it_is(tmp_path: Path, value: Any, reason: str) -> None:
    assert reasons(ask(tmp_path, {"answer": value})) == {reason: 1}


def test_a_number_is_a_caption_a_document_a_line_and_a_turn(tmp_path: Path) -> None:
    for line, caption in enumerate([3, 0, [0.5, "half"], True]):
        (tmp_path / f"{line}.jpg").write_bytes(JPEG)
        with (tmp_path / "p.jsonl").open("a") as stream:
            stream.write(json.dumps({"image": f"{line}.jpg", "caption": caption, "text": 2023}) + "\n")
    options = {"type": "pairs", "path": "p.jsonl", "image_root": ".", "captions": "all"}
    items = read_all(build_source({"name": "p", **options}, where="here", root=tmp_path))
    assert [sample.text for sample in kept(items)] == ["3", "0", "0.5", "half"]
    assert reasons(items) == {"wrong_field": 1}
    assert {sample.text for sample in kept(read_all(Text("t", tmp_path / "p.jsonl")))} == {"2023"}
    line = {"text": 2023, "quad": [[1, 1], [9, 1], [9, 5], [1, 5]]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "size": [10, 10], "lines": [line]}))
    assert kept(read_all(OCR("o", tmp_path)))[0].regions[0].text == "2023"
    (sample,) = kept(qwen(tmp_path, "How many?", 0))  # type: ignore[arg-type]
    assert sample.turns[1].text == "0"
