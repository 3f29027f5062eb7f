"""Readers of records: the published formats with their traps, and kept + dropped = read for each of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.formats.jsonl import Line, line_shards, read_lines
from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.ocr import OCR
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from megatron_vl.data.sources.refexp import RefExp
from megatron_vl.data.sources.registry import SOURCES, build_source
from megatron_vl.data.sources.text import Text
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_json

# images named by path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "image_outside_root"),
        ("/etc/hostname", "image_outside_root"),
        ("out.jpg", "image_outside_root"),
        ("pipe.jpg", "image_not_a_file"),
        ("sub", "image_not_a_file"),
        ("none.jpg", "missing_image"),
        ("empty.jpg", "empty_image"),
        ("https://example.org/a.jpg", "image_is_url"),
        ("a\0b.jpg", "bad_image_path"),
    ],
)
def test_only_regular_files_under_the_root_are_read(tmp_path: Path, name: str, reason: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "empty.jpg").touch()
    os.mkfifo(root / "pipe.jpg")
    turns = [{"from": "user", "value": f"<img>{name}</img>\nWhat?"}, {"from": "assistant", "value": "x"}]
    write_json(tmp_path / "chat.json", [{"id": "1", "conversations": turns}])
    assert reasons(read_all(QwenVLChat("chat", tmp_path / "chat.json", root))) == {reason: 1}


# referring expressions


def write_refexp(folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(JPEG)
    image = {"file_name": "a.jpg", "height": 200, "width": 400, "caption": "lady in blue"}
    boxes = [[100, 50, 200, 100], [-20, 20, 60, 300], [400, 0, 10, 10]]
    return write_json(
        folder / "ref.json",
        {
            "images": [{**image, "id": i} for i in range(4)],
            "annotations": [{"image_id": i, "bbox": box} for i, box in enumerate(boxes)],
        },
    )


def test_refexp_gives_both_directions(tmp_path: Path) -> None:
    path = write_refexp(tmp_path)
    items = read_all(RefExp("ref", path, tmp_path))
    assert [s.regions[0].boxes for s in kept(items)] == [((0.25, 0.25, 0.75, 0.75),), ((0.0, 0.1, 0.1, 1.0),)]
    assert {(s.task, s.question, s.text) for s in kept(items)} == {("referring", "lady in blue", "")}
    assert reasons(items) == {"bad_box": 1, "no_annotation": 1}
    region = kept(read_all(RefExp("ref", path, tmp_path, task="region_caption")))[0]
    assert (region.task, region.text, region.question) == ("region_caption", "lady in blue", "")


# OCR, text, chat


def plain_page(name: str, text: str) -> dict[str, Any]:
    """A line of SynthDoG's metadata."""
    return {"file_name": name, "ground_truth": json.dumps({"gt_parse": {"text_sequence": text}}, ensure_ascii=False)}


def write_metadata(folder: Path, records: list[Any]) -> None:
    for record in records:
        (folder / str(record["file_name"])).write_bytes(JPEG)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_ocr_reads_the_extended_form(tmp_path: Path) -> None:
    quad = [[0, 0], [50, 0], [50, 20], [0, 20]]
    lines = [{"text": "你好", "quad": quad}, {"text": "b", "quad": quad}]
    good = {"size": [100, 40], "lang": "zh", "lines": lines}
    others: list[dict[str, Any]] = [
        {"lines": [{"text": "a", "quad": quad[:3]}]},
        {"lines": [{"text": "a", "quad": [*quad[:3], [0, None]]}]},
        {"lines": [{"text": None, "quad": quad}]},
        {"lines": []},
        {"size": [100]},
        {"size": [0, 0]},
    ]
    records = [{**plain_page(f"image_{i}.jpg", "a b"), **good, **other} for i, other in enumerate([{}, *others])]
    write_metadata(tmp_path, records)
    items = read_all(OCR("synthdog", tmp_path))
    (sample,) = kept(items)
    assert (sample.text, sample.language, sample.images[0].key) == ("你好 b", "zh", "image_0.jpg")
    assert sample.regions[0].quads == ((0.0, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5),)
    assert reasons(items) == {"no_lines": 1, "bad_quad": 2, "bad_size": 2, "wrong_field": 1}


def test_ocr_asks_about_plain_synthdog_on_request(tmp_path: Path) -> None:
    records = [
        plain_page("image_17.jpg", "ural movement that is sceptical"),
        plain_page("image_3.jpg", "数学，是研究數量"),
    ]
    broken = [{"file_name": "image_4.jpg", "ground_truth": "{"}, {"file_name": "image_5.jpg", "ground_truth": "{}"}]
    write_metadata(tmp_path, [*records, *broken, plain_page("image_6.jpg", " ")])
    assert reasons(read_all(OCR("s", tmp_path))) == {"no_lines": 2, "bad_json": 1, "missing_field": 1, "empty_text": 1}
    items = read_all(OCR("s", tmp_path, language="zh", question="图中写了什么？"))
    assert [(s.task, s.language, s.question, s.text, s.images[0].key) for s in kept(items)] == [
        ("vqa", "zh", "图中写了什么？", "ural movement that is sceptical", "image_17.jpg"),
        ("vqa", "zh", "图中写了什么？", "数学，是研究數量", "image_3.jpg"),
    ]
    assert reasons(items) == {"bad_json": 1, "missing_field": 1, "empty_text": 1}


def test_ocr_asks_about_pages_with_positions_too(tmp_path: Path) -> None:
    quad = [[0, 0], [50, 0], [50, 20], [0, 20]]
    lines = [{"text": "one", "quad": quad}, {"text": "two", "quad": quad}]
    write_metadata(tmp_path, [{"file_name": "image_1.jpg", "size": [100, 40], "lines": lines}])
    (sample,) = kept(read_all(OCR("s", tmp_path, question="What is written?")))
    assert (sample.task, sample.question, sample.text, sample.regions) == ("vqa", "What is written?", "one two", ())


def test_ocr_refuses_the_metadata_of_two_runs(tmp_path: Path) -> None:
    write_metadata(tmp_path, [plain_page(f"image_{i}.jpg", "x") for i in (0, 1, 2, 1)])
    with pytest.raises(DataError, match=r"metadata\.jsonl: lines 2 and 4 both name 'image_1\.jpg'; the generator app"):
        OCR("s", tmp_path).shards()


def test_text_tolerates_bom_and_blank_lines_and_names_bad_ones(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one", "lang": "en"}',
        b"",
        b'{"text": "zwei\\nDrei"}',
        b'{"text": ',
        b'{"txt": "x"}',
        b'{"text": "\\ud800"}',
        b"[1]",
        b'{"text": "\xff"}',
        b"[" * 100_000,
        '{"text": "数学", "lang": "zh"}'.encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read_all(Text("text", tmp_path))
    assert [(s.key, s.text, s.language) for s in kept(items)] == [
        ("a.jsonl:1", "one", "en"),
        ("a.jsonl:3", "zwei\nDrei", "en"),
        ("a.jsonl:10", "数学", "zh"),
    ]
    assert [(i.key, i.reason) for i in items if isinstance(i, Skipped)] == [
        ("a.jsonl:4", "bad_json"),
        ("a.jsonl:5", "missing_field"),
        ("a.jsonl:6", "bad_unicode"),
        ("a.jsonl:7", "bad_json"),
        ("a.jsonl:8", "bad_json"),
        ("a.jsonl:9", "bad_json"),
    ]


def test_a_line_beyond_the_cap_is_skipped_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vl.data.formats.jsonl.MAX_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 500}) + '\n{"text": "next"}\n')
    items = read_all(Text("text", tmp_path / "a.jsonl"))
    assert reasons(items) == {"line_too_long": 1}
    assert [s.text for s in kept(items)] == ["next"]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(blanks=st.lists(st.booleans(), max_size=12), size=st.integers(1, 5), newline=st.booleans())
def test_shards_of_lines_cover_the_file_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, blanks: list[bool], size: int, newline: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = ["" if blank else json.dumps({"n": i}) for i, blank in enumerate(blanks)]
    path.write_text("\n".join(lines) + ("\n" if newline else ""))
    found = [item for shard in line_shards(path, size) for item in read_lines(shard)]
    assert [item.record["n"] for item in found if isinstance(item, Line)] == [i for i, b in enumerate(blanks) if not b]
    assert [item.number for item in found if isinstance(item, Line)] == [i + 1 for i, b in enumerate(blanks) if not b]


# files and recipes that cannot work


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    path = write_json(tmp_path / "list.json", [1])
    with pytest.raises(DataError, match=r"list\.json: found '\[1\]', expected an object with 'images' at the top"):
        RefExp("r", path, tmp_path).shards()
    with pytest.raises(DataError, match="expected a list under 'images'; found the keys .*'a'"):
        RefExp("r", write_json(tmp_path / "o.json", {"a": 1}), tmp_path).shards()
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"cut\.json: not valid JSON"):
        RefExp("r", tmp_path / "cut.json", tmp_path).shards()
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        QwenVLChat("c", tmp_path / "gone.json", tmp_path).shards()
    with pytest.raises(DataError, match=r"pictures: no such folder; expected .*image_root"):
        QwenVLChat("c", path, tmp_path / "pictures").shards()


def test_build_source_fills_the_reader(tmp_path: Path) -> None:
    entry = {
        "name": "r",
        "type": "refexp",
        "path": "r.json",
        "image_root": "/data/coco",
        "task": "region_caption",
    }
    source = build_source(entry, where="data.yaml: sources[0]", root=tmp_path)
    assert source == RefExp("r", tmp_path / "r.json", Path("/data/coco"), "region_caption")
    ocr = build_source({"name": "o", "type": "ocr", "path": "p", "image_root": None}, where="x")
    assert ocr == OCR("o", Path("p"))
    score = build_source({"name": "g", "type": "grounded_caption", "path": "p", "min_score": 1}, where="x")
    assert score == GroundedCaption("g", Path("p"), min_score=1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "a", "type": "img2datset"},
            "sources.0.: unknown source type 'img2datset'. Did you mean img2dataset",
        ),
        ({"name": "a"}, "sources.0.: 'type' is missing; it names the reader, one of .*img2dataset, .*refcoco"),
        ({"name": "a", "type": None}, "'type' is missing"),
        ({"name": "a", "type": 3}, "unknown source type 3; valid are"),
        (
            {"name": "a", "type": "text", "pth": "x"},
            "unknown key 'pth' for source type text. Did you mean path",
        ),
        ({"name": "a", "type": "refexp", "path": "x"}, "image_root is missing for source type refexp"),
        ({"name": "a", "type": "text", "path": 3}, r"path: found 3 .an integer., expected a path"),
        (
            {"name": "a", "type": "text", "path": "x", "language": "de"},
            "language: found 'de' .a string., expected one of en, zh",
        ),
        ({"name": "a", "type": "text", "path": "x", "records_per_shard": "9"}, "found '9' .a string., expected an int"),
        ("text", "expected a mapping"),
    ],
)
def test_a_wrong_entry_says_where_and_what(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source(entry, where="data.yaml: sources[0]")


def test_every_type_is_a_reader_with_a_name() -> None:
    assert all(issubclass(reader, Source) for reader in SOURCES.values())
