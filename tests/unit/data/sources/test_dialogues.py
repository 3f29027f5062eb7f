"""Dialogues: Qwen-VL's and LLaVA's files, what becomes of them, and every dialogue counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vl.data.prompting.chat import parse_markup
from megatron_vl.data.prompting.coordinates import parse_points
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_json


def chat(*turns: tuple[str, str], **other: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in turns], **other}


def test_qwen_vl_reads_images_in_order_and_checks_turns(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"one")
    (tmp_path / "2.jpg").write_bytes(b"two")
    dialogues = [
        chat(
            ("user", "Picture 1: <img>2.jpg</img>\nPicture 2: <img>1.jpg</img>\n框出图1中的猫"),
            ("assistant", "好"),
        ),
        chat(("assistant", "dropped"), ("user", "hi"), ("assistant", "hello"), ("user", "unanswered")),
        chat(("user", "hi"), ("gpt", "hello")),
        chat(("user", "hi")),
        chat(("user", "<img>1.jpg"), ("assistant", "x")),
        chat(("user", "a"), ("user", "b"), ("assistant", "x")),
        {"id": 3},
    ]
    source = QwenVLChat("sft", write_json(tmp_path / "c.json", dialogues), tmp_path, records_per_shard=3)
    assert [shard.name for shard in source.shards()] == ["c.json:0", "c.json:3", "c.json:6"]
    items = read_all(source)
    first, second = kept(items)
    assert [image.data for image in first.images] == [b"two", b"one"]
    assert [(t.role, t.text) for t in second.turns] == [("user", "hi"), ("assistant", "hello")]
    expected = ("unknown_role", "no_answer", "unbalanced_image_tag", "turns_out_of_order", "missing_field")
    assert reasons(items) == dict.fromkeys(expected, 1)


LLAVA = [
    chat(
        ("human", "What is parked by the kerb?\n<image>"),
        ("gpt", "A white bus."),
        ("human", "Is it moving?"),
        ("gpt", "No."),
        image="coco/train2017/000000033471.jpg",
    ),
    chat(("human", "<image>\nDescribe it."), ("gpt", "A bus."), image="coco/train2017/000000033471.jpg"),
    chat(("human", "Write a poem."), ("gpt", "Roses.")),
    chat(
        ("human", "Compare <image> with\n<image>"),
        ("gpt", "Alike."),
        image=["coco/train2017/000000033471.jpg", "gqa/images/1.jpg"],
    ),
    chat(("gpt", "dropped"), ("human", "hi"), ("gpt", "hello")),
    chat(("human", "<image>\nWhat?"), ("gpt", "x"), image="coco/train2017/gone.jpg"),
    chat(("human", "What is <image> for?"), ("gpt", "a tag")),
    chat(("human", "no mark"), ("gpt", "x"), image="gqa/images/1.jpg"),
    chat(("human", "how do I write <img>?"), ("gpt", "<img>a.png</img>")),
    chat(("human", "hi"), ("bing", "hello")),
    chat(("human", "<image>\nx"), ("gpt", "y"), image=7),
    chat(("human", "\ud800"), ("gpt", "y")),
    chat(("human", None), ("gpt", "y")),  # type: ignore[arg-type]
    "no object",
]


def write_llava(folder: Path) -> LLaVA:
    for name in ("coco/train2017/000000033471.jpg", "gqa/images/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    return LLaVA("llava", write_json(folder / "llava.json", LLAVA), folder)


def test_llava_becomes_picture_lines(tmp_path: Path) -> None:
    items = read_all(write_llava(tmp_path))
    bus = "Picture 1: <img>coco/train2017/000000033471.jpg</img>\n"
    assert [[turn.text for turn in sample.turns] for sample in kept(items)] == [
        [bus + "What is parked by the kerb?", "A white bus.", "Is it moving?", "No."],
        [bus + "Describe it.", "A bus."],
        ["Write a poem.", "Roses."],
        [f"Compare {bus} with\nPicture 2: <img>gqa/images/1.jpg</img>\n", "Alike."],
        ["hi", "hello"],
    ]
    assert {turn.role for sample in kept(items) for turn in sample.turns} == {"user", "assistant"}
    assert [len(sample.images) for sample in kept(items)] == [1, 1, 0, 2, 0]
    assert reasons(items) == {
        "missing_image": 1,
        "image_mismatch": 2,
        "markup_in_text": 1,
        "unknown_role": 1,
        "wrong_field": 3,
        "bad_unicode": 1,
    }
    assert len(items) == len(LLAVA)


@pytest.mark.parametrize("size", [(400, 200), (200, 400), (300, 300)])
def test_llava_boxes_of_the_padded_square_become_boxes_of_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    side = max(size)
    box = (0.25, 0.1, 0.75, 0.9)
    padded = [(box[i] * size[i % 2] + (side - size[i % 2]) // 2) / side for i in range(4)]
    region = "[" + ", ".join(f"{value:.4f}" for value in padded) + "]"
    turns = (("human", f"<image>\nDescribe {region} please, and [1, 0, 0, 1]."), ("gpt", region))
    path = write_json(tmp_path / "l.json", [chat(*turns, image="a.jpg"), chat(*turns[1:], *turns[1:])])
    sample = kept(read_all(LLaVA("l", path, tmp_path)))[0]
    assert sample.turns[0].text.endswith(" please, and [1, 0, 0, 1].")
    for turn in sample.turns:
        (text,) = [piece.text for piece in parse_markup(turn.text) if piece.text.startswith("(")]
        found = parse_points(text, 2)
        assert found is not None and max(abs(a - b) for a, b in zip(found, box, strict=True)) < 0.001
    as_it_is = kept(read_all(LLaVA("l", path, tmp_path, convert_boxes=False)))[0]
    assert as_it_is.turns[1].text == region


def test_a_llava_box_beside_the_image_drops_the_dialogue(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200)).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "b.jpg").write_bytes(JPEG)
    turns = (("human", "<image>\nWhere?"), ("gpt", "[0.1, 0.0, 0.9, 0.2]"))
    path = write_json(tmp_path / "l.json", [chat(*turns, image="a.jpg"), chat(*turns, image="b.jpg")])
    assert reasons(read_all(LLaVA("l", path, tmp_path))) == {"bad_box": 1, "unreadable_image": 1}
