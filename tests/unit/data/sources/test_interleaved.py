"""Documents of text and images: both layouts, their order in the rows, what is learned, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.prompting.tasks import render
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import IMAGE_MARK, ImageRef, Sample
from megatron_vl.data.sources.interleaved import Interleaved
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data.prepared import QUERIES, RANKS, make_data_set, png
from tests.helpers.data.reading import kept, read_all, reasons

OBELICS = {
    "texts": ["A cat. ", None, "It sleeps.", "So does it:", None],
    "images": [None, "1.png", None, None, "2.png"],
}
MMC4 = {
    "text_list": ["A cat.", "It sleeps.", "The end."],
    "image_info": [
        {"image_name": "2.png", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "1.png", "matched_text_index": 1, "matched_sim": 0.2},
    ],
}


def write_documents(folder: Path, *documents: Any) -> Interleaved:
    for shade in (1, 2):
        (folder / f"{shade}.png").write_bytes(png(shade))
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return Interleaved("docs", path, folder, records_per_shard=2)


def test_both_layouts(tmp_path: Path) -> None:
    source = write_documents(tmp_path, OBELICS, MMC4, {"texts": ["Only", "text"], "images": [None, None]})
    assert len(source.shards()) == 2
    obelics, mmc4, plain = kept(read_all(source))
    mark = IMAGE_MARK
    assert (obelics.task, obelics.text) == ("interleaved", f"A cat.{mark}It sleeps.\n\nSo does it:{mark}")
    assert [image.data for image in obelics.images] == [png(1), png(2)]
    assert (mmc4.task, mmc4.text) == ("interleaved", f"A cat.{mark}{mark}It sleeps.\nThe end.")
    assert [image.key for image in mmc4.images] == ["2.png", "1.png"]
    assert (plain.task, plain.text, plain.key) == ("text", "Only\n\ntext", "documents.jsonl:3")


def test_what_is_wrong_is_counted_by_reason(tmp_path: Path) -> None:
    source = write_documents(
        tmp_path,
        {"texts": ["a"], "images": []},
        {"texts": [None], "images": [None]},
        {"texts": ["a"], "images": ["1.png"]},
        {"texts": [None], "images": [3]},
        {"texts": ["a", None], "images": [None, "missing.png"]},
        {"texts": ["a", None], "images": [None, "../1.png"]},
        {"texts": [None], "images": ["1.png"]},
        {"text_list": ["a"], "image_info": [{"image_name": "1.png", "matched_text_index": 1}]},
        {"text_list": [1], "image_info": []},
        {"image_info": []},
        [],
    )
    with source.path.open("a") as stream:
        stream.write('{"texts": ["\\ud800"], "images": [null]}\n{"texts"')
    items = read_all(source)
    assert len(items) == 13 and not kept(items)
    assert reasons(items) == {
        "wrong_field": 5, "missing_image": 1, "image_outside_root": 1, "empty_text": 1, "bad_span": 1,
        "missing_field": 1, "bad_json": 2, "bad_unicode": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        (tmp_path / "empty").mkdir()
        Interleaved("docs", tmp_path / "empty", tmp_path).shards()


def test_text_is_learned_and_images_are_not() -> None:
    images = (ImageRef("a", b""), ImageRef("b", b""))
    pieces = render(Sample("k", "s", "interleaved", images=images, text=f"{IMAGE_MARK}one{IMAGE_MARK}two"))
    assert [(piece.kind, piece.text, piece.supervised) for piece in pieces] == [
        ("image", "", False), ("text", "one", True), ("image", "", False), ("text", "two", True),
        ("special", "<|endoftext|>", True),
    ]  # fmt: skip
    with pytest.raises(SkipSample, match="image_mismatch: 1 places in the text for 2 images"):
        render(Sample("k", "s", "interleaved", images=images, text=f"one{IMAGE_MARK}"))
    with pytest.raises(SkipSample, match="empty_text"):
        render(Sample("k", "s", "interleaved", images=images, text=IMAGE_MARK * 2))


def test_a_document_in_a_row(tmp_path: Path) -> None:
    write_documents(tmp_path, {**OBELICS, "texts": ["A\ufffc cat.", None, "It sleeps.", "\x07So:", None]})
    sources = [{"name": "docs", "type": "interleaved", "path": "documents.jsonl", "image_root": "."}]
    filters = {"strip_irregular": True, "strip_html": True}
    store = RowStore(make_data_set(tmp_path, sources=sources, filters=filters, seq_length=96))
    assert [(count.task, count.images) for count in read_manifest(tmp_path / "set").counts] == [("interleaved", 2)]
    row = store.row(0)
    image = f"<img>{'<imgpad>' * QUERIES}</img>"
    tokenizer = QwenTokenizer(RANKS)
    assert tokenizer.decode(row.tokens.tolist()) == f"A cat.{image}It sleeps.\n\nSo:{image}<|endoftext|>"
    learned = tokenizer.decode(row.tokens[row.supervised].tolist())
    assert learned == "A cat.It sleeps.\n\nSo:<|endoftext|>"
    assert [store.image(index) for index in row.image_ids.tolist()] == [png(1), png(2)]
