"""Records that contradict themselves, speak of another format, or say more than is learned: left out by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.formats.image_files import image_names
from megatron_vl.data.sources.boxes import box_from_corners, quad_from_points
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from megatron_vl.data.sources.refexp import RefExp
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import SkipSample
from tests.helpers.data.published_grounding import write_refcoco
from tests.helpers.data.reading import JPEG, kept, qwen, read_all, reasons, write_json, write_tar

PAGE = (100, 50)


def test_fractions_where_pixels_are_expected_are_no_boxes() -> None:
    for corners in ((0.1, 0.2, 0.5, 0.9), (0, 0, 1, 1), (5, 5, 5.5, 5.5)):
        with pytest.raises(SkipSample, match="bad_box: .* not larger than a pixel"):
            box_from_corners(corners, *PAGE)
        x1, y1, x2, y2 = corners
        with pytest.raises(SkipSample, match="bad_quad: .* not larger than a pixel"):
            quad_from_points([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], *PAGE)
    assert box_from_corners((5, 5, 6.5, 5.5), *PAGE) == (0.05, 0.1, 0.065, 0.11)


def test_two_answers_to_one_question_are_none(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(JPEG)
    said = [(1, "a"), (2, "b"), (1, "c"), (2, "b")]
    answers = [{"question_id": number, "answers": text} for number, text in said]
    questions = [{"question_id": number, "question": "What?", "image_id": 1} for number in (1, 2)]
    source = VQA(
        "v",
        write_json(tmp_path / "q.json", {"questions": questions}),
        tmp_path,
        write_json(tmp_path / "a.json", {"annotations": answers}),
        ("{image_id}.jpg",),
    )
    items = read_all(source)
    assert [sample.text for sample in kept(items)] == ["b"] and reasons(items) == {"contradiction": 1}


def test_a_box_of_another_image_is_not_learned(tmp_path: Path) -> None:
    source = write_refcoco(tmp_path)
    path = source.path / "instances.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["image_id"] = 7
    before, after = kept(read_all(source)), (write_json(path, document), read_all(source))[1]
    assert len(kept(after)) == len(before) - 2 and reasons(after)["contradiction"] == 2


def test_a_caption_with_boxes_of_several_phrases_is_no_expression(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    image = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50, "caption": "a dog and a cat"}
    boxes = [{"image_id": 1, "bbox": [1, 1, 20, 20], "tokens_positive": [[start, start + 5]]} for start in (0, 10, 0)]
    for found, expected in ((boxes, {"several_phrases": 1}), (boxes[::2], {})):
        path = write_json(tmp_path / "r.json", {"images": [image], "annotations": found})
        assert reasons(read_all(RefExp("r", path, tmp_path))) == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "a.jpg"}, "image_mismatch"),
        ({"images": ["a.jpg"]}, "image_mismatch"),
        ({"video": "a.mp4"}, "unsupported_media"),
        ({"audios": ["a.wav"]}, "unsupported_media"),
        ({"image": "a.jpg", "images": ["a.jpg"]}, "contradiction"),
        ({"image": None, "images": [], "video": ""}, ""),
    ],
)
def test_media_beside_a_dialogue_that_does_not_name_them_are_not_dropped(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    expected = {reason: 1} if reason else {}
    assert reasons(qwen(tmp_path, "What?", "A dog", **fields)) == expected
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog"}]
    path = write_json(tmp_path / "l.json", [{"conversations": turns, **fields}])
    assert reasons(read_all(LLaVA("l", path, tmp_path))) == expected


def test_llava_reads_images_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog"}]
    for fields in ({"image": "a.jpg"}, {"image": ["a.jpg"]}, {"images": ["a.jpg"]}, {"images": "a.jpg"}):
        path = write_json(tmp_path / "l.json", [{"conversations": turns, **fields}])
        (sample,) = kept(read_all(LLaVA("l", path, tmp_path)))
        assert [image.key for image in sample.images] == ["a.jpg"]


@pytest.mark.parametrize("mark", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}])
def test_a_turn_that_is_not_to_be_learned_leaves_the_dialogue_out(tmp_path: Path, mark: dict[str, Any]) -> None:
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello", **mark}]
    path = write_json(tmp_path / "q.json", [{"conversations": turns}])
    assert reasons(read_all(QwenVLChat("q", path, tmp_path))) == {"masked_turn": 1}
    turns[0].update(mark)
    turns[1].update(loss=True, weight=1)
    write_json(path, [{"conversations": turns}])
    assert len(kept(read_all(QwenVLChat("q", path, tmp_path)))) == 1


@pytest.mark.parametrize(
    ("named", "language"),
    [("zh", "zh"), ("zh-CN", "zh"), ("ZH_Hans", "zh"), ("en-US", "en"), ("de", "zh"), (None, "zh"), (3, "zh")],
)
def test_a_record_s_language_is_what_it_says_or_that_of_its_source(tmp_path: Path, named: Any, language: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "x", "lang": named}) + "\n")
    assert kept(read_all(Text("t", tmp_path / "t.jsonl", language="zh")))[0].language == language


@pytest.mark.parametrize(
    ("text", "reason"),
    [("<image>\nWhat?", "image_mismatch"), ("<video>\nWhat?", "unsupported_media"), ("<ref>it", "unbalanced_ref")],
)
def test_marks_of_other_formats_are_not_learned_as_words(tmp_path: Path, text: str, reason: str) -> None:
    assert reasons(qwen(tmp_path, text, "A dog")) == {reason: 1}


@pytest.mark.parametrize("number", [7, 7.0, "7"])
def test_a_whole_number_names_an_image(number: Any) -> None:
    assert image_names(["{id}.jpg"], {"id": number}) == ["7.jpg"]
    if number != "7":
        assert image_names(["{id:03d}.jpg"], {"id": number}) == ["007.jpg"]


@pytest.mark.parametrize("value", [7.5, None, True, ["7"], float("nan")])
def test_what_names_no_image_is_named(value: Any) -> None:
    with pytest.raises(SkipSample, match="wrong_field: 'id', for the image's name, is"):
        image_names(["{id}.jpg"], {"id": value})


@pytest.mark.parametrize(
    ("caption", "span", "good"),
    [
        ("a dog runs", (0, 5), True),
        ("a dog runs", (1, 5), True),
        ("a dog runs", (6, 10), True),
        ("a dog runs", (1, 4), False),
        ("a dog runs", (3, 10), False),
        ("一只狗在跑", (0, 3), True),
        ("the dog's bone", (0, 7), True),
    ],
)
def test_a_phrase_of_a_caption_does_not_cut_its_words(
    tmp_path: Path, caption: str, span: tuple[int, int], good: bool
) -> None:
    fields = {"caption": caption, "ref_exps": [[*span, 0.1, 0.1, 0.5, 0.5, 0.9]]}
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.json", json.dumps(fields).encode())])
    assert reasons(read_all(GroundedCaption("g", tmp_path / "0.tar"))) == ({} if good else {"bad_span": 1})


def test_a_blank_phrase_is_none(tmp_path: Path) -> None:
    phrases = [[*span, 0.1, 0.1, 0.5, 0.5, 0.9] for span in ((0, 5), (5, 7), (8, 12))]
    fields = {"caption": "a dog   runs", "ref_exps": phrases}
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.json", json.dumps(fields).encode())])
    (sample,) = kept(read_all(GroundedCaption("g", tmp_path / "0.tar")))
    assert [region.text for region in sample.regions] == ["a dog", "runs"]
    assert reasons(read_all(GroundedCaption("g", tmp_path / "0.tar", task="referring"))) == {"empty_text": 1}
