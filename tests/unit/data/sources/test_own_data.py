"""Files as people have them: from Macs and Windows, with dots in names, in the other form of JSON, half downloaded.

Each is read as its container says, or left out under a reason that tells what it is, or refused with what to do.
"""

from __future__ import annotations

import codecs
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.file_kinds import is_clutter, what_is
from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.filters.rules import SampleFilter
from megatron_vl.data.sample import ImageRef, Sample
from megatron_vl.data.sources.ai2d import AI2D
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.caption_files import CaptionFiles
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.data.sources.interleaved import Interleaved
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.ocr import OCR
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data.reading import JPEG, details, kept, learned, pair, read_all, reasons, write_folder, write_tar

BOM = codecs.BOM_UTF8
CLUTTER = ["._0.jpg", "._0.txt", "__MACOSX/._0.jpg", "__MACOSX/0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini",
           ".ipynb_checkpoints/0-checkpoint.txt"]  # fmt: skip


# Names


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_what_systems_leave_beside_the_data_is_ignored(tmp_path: Path, form: str) -> None:
    assert all(map(is_clutter, CLUTTER)) and not any(map(is_clutter, ["./0.jpg", "../0.jpg", "a/0.jpg", "a.b"]))
    files = {**dict.fromkeys(CLUTTER, b"\x00\x05\x16\x07 of macOS"), **pair("0"), **pair("1")}
    if form == "tar":
        write_tar(tmp_path / "a.tar", [*files.items()])
        (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    else:
        write_folder(tmp_path, files)
    items = read_all(Img2Dataset("s", tmp_path))
    assert [sample.text for sample in kept(items)] == ["0", "1"] and not reasons(items)


def test_what_systems_leave_is_ignored_by_every_reader_of_folders(tmp_path: Path) -> None:
    line = json.dumps({"text": "a document", "image": "0.jpg", "caption": "a cat"}).encode()
    write_folder(tmp_path, {"a.jsonl": line, "._a.jsonl": b"\0\5\x16\7", "0.jpg": JPEG})
    assert learned(Text("t", tmp_path)) == ["a document"]
    assert learned(CaptionFiles("p", tmp_path, tmp_path)) == ["a cat"]
    assert not reasons(read_all(Text("t", tmp_path)))


def test_a_folder_takes_names_up_to_the_last_dot(tmp_path: Path) -> None:
    """``photo.v1.jpg`` beside ``photo.v1.txt`` was neither kept nor counted."""
    write_folder(tmp_path, {**pair("photo.v1"), **pair("photo.v2"), **pair("img_12.5mm"), **pair("ok")})
    items = read_all(Img2Dataset("s", tmp_path))
    assert sorted(sample.text for sample in kept(items)) == ["img_12.5mm", "ok", "photo.v1", "photo.v2"]
    assert not reasons(items)


def test_a_tar_takes_names_up_to_the_first_dot_and_counts_what_that_loses(tmp_path: Path) -> None:
    """``photo.v1`` and ``photo.v2`` were merged into one record of nothing."""
    files = {**pair("photo.v1"), **pair("photo.v2"), **pair("d/img_12.5mm"), **pair("ok")}
    write_tar(tmp_path / "0.tar", [*files.items()])
    source = Img2Dataset("s", tmp_path)
    assert learned(source) == ["ok"] and reasons(read_all(source)) == {"dotted_name": 3}
    assert [text.partition(": ")[0] for text in details(source)] == [
        "0.tar/photo.v1", "0.tar/photo.v2", "0.tar/d/img_12.5mm"
    ]  # fmt: skip
    assert "the key ends at the first dot" in details(source)[0] and "photo_v1.jpg" in details(source)[0]


def test_suffixes_of_webdataset_with_a_dot_are_no_records(tmp_path: Path) -> None:
    """A mask ``0.seg.png`` belongs to record 0; a second pair does not."""
    write_tar(tmp_path / "0.tar", [*{**pair("0"), "0.seg.png": JPEG, "0.meta.cls": b"1", **pair("0.v1")}.items()])
    source = Img2Dataset("s", tmp_path)
    assert learned(source) == ["0"]
    assert [text.partition(": ")[0] for text in details(source)] == ["0.tar/0.v1"]


@pytest.mark.parametrize("cut", [False, True])
def test_members_of_a_record_need_not_be_neighbors(tmp_path: Path, cut: bool) -> None:
    """``tar cf 0.tar *.jpg *.txt`` makes tars that gave no pair at all."""
    names = [f"{number}.{suffix}" for suffix in ("jpg", "txt") for number in range(5)]
    members = [(name, JPEG if name.endswith("jpg") else name.encode()) for name in names]
    path = write_tar(tmp_path / "0.tar", members)
    if cut:
        path.write_bytes(path.read_bytes()[: 512 * 2 * 7 + 512 + 2])
    items = read_all(Img2Dataset("s", tmp_path))
    assert [sample.text for sample in kept(items)] == [f"{number}.txt" for number in range(2 if cut else 5)]
    assert reasons(items) == ({"no_caption": 2, "incomplete_record": 1, "truncated_tar": 1} if cut else {})


def test_tars_laid_end_to_end_are_read_to_the_end(tmp_path: Path) -> None:
    """``cat a.tar b.tar``: what is behind the first end-of-archive marker was lost without a word."""
    parts = [write_tar(tmp_path / f"{name}.tar", [*pair(name).items()]).read_bytes() for name in "ab"]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert learned(Img2Dataset("s", tmp_path / "all.tar")) == ["a", "b"]
    (tmp_path / "all.tar").write_bytes(parts[0] + b"\1" * 512)
    items = read_all(Img2Dataset("s", tmp_path / "all.tar"))
    assert [sample.text for sample in kept(items)] == ["a"] and reasons(items) == {"truncated_tar": 1}


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_two_images_under_one_name_are_named(tmp_path: Path, form: str) -> None:
    """Which of them the caption is about is not for us to say."""
    files = [("0.jpg", JPEG), ("0.png", JPEG), ("0.txt", b"which?"), *pair("1").items()]
    if form == "tar":
        write_tar(tmp_path / "0.tar", [*files, *pair("2").items(), *pair("2").items()])
    else:
        write_folder(tmp_path, dict(files))
    items = read_all(Img2Dataset("s", tmp_path))
    assert [sample.text for sample in kept(items)] == ["1"]
    assert reasons(items) == {"duplicate_member": 2 if form == "tar" else 1}


# Byte-order marks


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, form: str) -> None:
    files = {**pair("0"), "0.txt": BOM + b"a cat", "1.jpg": JPEG, "1.json": BOM + b'{"caption": "\xef\xbb\xbfa dog"}'}
    if form == "tar":
        write_tar(tmp_path / "0.tar", [*files.items()])
    else:
        write_folder(tmp_path, files)
    assert learned(Img2Dataset("s", tmp_path)) == ["a cat", "a dog"]


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    """Neither where files were laid end to end, nor within a value."""
    lines = [BOM + b'{"text": "one"}\r\n', BOM + b'{"text": "\xef\xbb\xbftwo"}\n', BOM + b"\r\n", b'{"text": "3"}']
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    source = Text("t", tmp_path / "a.jsonl")
    assert learned(source) == ["one", "two", "3"] and not details(source)
    document = {"texts": ["\ufeffA cat.", None], "images": [None, "0.jpg"]}
    write_folder(tmp_path, {"0.jpg": JPEG, "d.jsonl": BOM + json.dumps(document).encode()})
    assert learned(Interleaved("i", tmp_path / "d.jsonl", tmp_path)) == ["A cat.\ufffc"]
    (tmp_path / "c.tsv").write_bytes(BOM + b"a cat\t0.jpg\n" + BOM + b"a dog\t0.jpg\n")
    table = CaptionFiles("p", tmp_path / "c.tsv", tmp_path, columns=("caption", "image"), header=False)
    assert learned(table) == ["a cat", "a dog"]


def test_a_byte_order_mark_where_places_are_counted_leaves_the_record_out(tmp_path: Path) -> None:
    meta = {"caption": "\ufeffa cat", "ref_exps": [[0, 5, 0.1, 0.1, 0.5, 0.5, 0.9]]}
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.json", json.dumps(meta).encode())])
    assert reasons(read_all(GroundedCaption("g", tmp_path))) == {"unclean_text": 1}


def test_a_byte_order_mark_hides_no_name_of_a_list(tmp_path: Path) -> None:
    """The first image of a list of images to leave out was learned, and the first test diagram of AI2D."""
    (tmp_path / "names").write_bytes(BOM + b"12\r\nb.jpg\r\n")
    rules = SampleFilter(FilterOptions(exclude_images=tmp_path / "names"))
    for name in ("COCO_train2014_000000000012.jpg", "b.jpg"):
        with pytest.raises(SkipSample, match="excluded_image"):
            rules.apply(Sample("k", "s", "caption", "en", (ImageRef(name, JPEG),), text="a cat"))
    question = {"questions": {"What?": {"answerTexts": ["a", "b"], "correctAnswer": 0}}}
    write_folder(
        tmp_path / "ai2d",
        {"questions/7.png.json": BOM + json.dumps(question).encode(), "images/7.png": JPEG, "annotations/x": b""},
    )
    (tmp_path / "ids.csv").write_bytes(BOM + b"7\n9\n")
    assert reasons(read_all(AI2D("a", tmp_path / "ai2d", tmp_path / "ids.csv"))) == {"other_split": 1}
    assert learned(AI2D("a", tmp_path / "ai2d", tmp_path / "ids.csv", split="test")) == ["a"]


# Forms of JSON

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]
CHAT = {"image": "0.jpg", "conversations": TURNS}
RECORD = {
    "image": "0.jpg", "caption": "c", "text": "t", "question": "q", "answer": "a", "texts": ["i"], "images": [None],
}  # fmt: skip


def sources_of(path: Path) -> dict[str, tuple[Source, dict[str, Any]]]:
    """Every reader of lists or lines, with a record of its own."""
    root = path.parent
    return {
        "llava": (LLaVA("s", path, root), CHAT),
        "pairs": (CaptionFiles("s", path, root), RECORD),
        "text": (Text("s", path), RECORD),
        "interleaved": (Interleaved("s", path, root), RECORD),
        "vqa": (VQA("s", path, root, image_pattern=("{image}",), records="", answer_field="answer"), RECORD),
    }


FORMS = {
    "list": lambda records: json.dumps(records),
    "pretty list": lambda records: json.dumps(records, indent=1),
    "lines": lambda records: "".join(json.dumps(record) + "\n" for record in records),
    "lines of Windows": lambda records: "\r\n".join(["", *map(json.dumps, records)]),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", ["llava", "pairs", "text", "interleaved", "vqa"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_records_are_read_in_either_form_whatever_the_name(
    tmp_path: Path, reader: str, form: str, suffix: str, mark: bytes
) -> None:
    (tmp_path / "0.jpg").write_bytes(JPEG)
    source, record = sources_of(tmp_path / f"d{suffix}")[reader]
    (tmp_path / f"d{suffix}").write_bytes(mark + FORMS[form]([record] * 5).encode())
    items = read_all(source)
    assert len(kept(items)) == len(items) == 5
    if hasattr(source, "records_per_shard"):
        object.__setattr__(source, "records_per_shard", 2)
        assert len(source.shards()) == 3 and len(kept(read_all(source))) == 5


@pytest.mark.parametrize("reader", ["llava", "pairs", "text", "interleaved", "vqa"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1}]'.encode("utf-16"), "text in UTF-16.*iconv"),
        ('{"a": 1}\n'.encode("utf-16-le"), "text in UTF-16.*iconv"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS.*git lfs pull"),
        (b"\x1f\x8b\x08\0", "compressed with gzip.*gunzip"),
        (b"<!DOCTYPE html><html>Sign in", "an HTML or XML page"),
        (b"\0" * 4096, "zero bytes"),
        (b"PAR1\x15", "a parquet file"),
    ],
)
def test_a_file_of_another_kind_is_refused_as_what_it_is(
    tmp_path: Path, reader: str, content: bytes, said: str
) -> None:
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"d{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"d{suffix}: it is {said}"):
            sources_of(path)[reader][0].shards()


def test_a_document_where_only_lines_can_be_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('[{"file_name": "0.jpg"}]')
    with pytest.raises(DataError, match=r"metadata\.jsonl: is a JSON document; expected an object a line: jq"):
        OCR("o", tmp_path).shards()
    (tmp_path / "d.jsonl").write_text('{\n "text": "a"\n}\n{\n "text": "b"\n}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: begins with an object over several lines.*jq -c"):
        Text("t", tmp_path / "d.jsonl").shards()


def test_text_in_utf16_beside_an_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {**pair("0"), "0.txt": "a cat".encode("utf-16")})
    source = Img2Dataset("s", tmp_path)
    assert reasons(read_all(source)) == {"bad_unicode": 1} and "UTF-16" in details(source)[0]


# Archives


def test_a_shard_of_another_kind_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    write_folder(tmp_path, {"0.tar": pointer, "1.tar": b"\x1f\x8b\x08\0"})
    source = Img2Dataset("s", tmp_path)
    assert reasons(read_all(source)) == {"truncated_tar": 2}
    assert "Git LFS" in details(source)[0] and "gunzip" in details(source)[1]
    (tmp_path / "a.zip").write_bytes(pointer)
    with pytest.raises(DataError, match=r"a\.zip: no readable zip archive .*Git LFS"):
        LLaVA("s", tmp_path / "d.json", tmp_path / "a.zip").shards()


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "1.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(DataError, match=r"1\.tar\.gz: expected a \.tar, .*; it is compressed with gzip"):
        Img2Dataset("s", tmp_path / "1.tar.gz").shards()


def test_documents_of_a_mac_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("q/1.json", json.dumps([RECORD]))
        archive.writestr("q/._1.json", b"\0\5\x16\7")
        archive.writestr("__MACOSX/q/._1.json", b"\0\5\x16\7")
    (tmp_path / "0.jpg").write_bytes(JPEG)
    source = sources_of(tmp_path / "a.zip" / "q" / "1.json")["vqa"][0]
    object.__setattr__(source, "image_root", tmp_path)
    assert learned(source) == ["a"]


# Paths and parquet


def test_an_absolute_path_under_the_root_is_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "img", {"0.jpg": JPEG})
    for name, expected in ((str(root / "0.jpg"), {}), ("/elsewhere/0.jpg", {"image_outside_root": 1})):
        (tmp_path / "d.json").write_text(json.dumps([{**CHAT, "image": name}]))
        source = LLaVA("s", tmp_path / "d.json", root)
        assert reasons(read_all(source)) == expected
    assert "take the front off" in details(source)[0]
    (tmp_path / "d.json").write_text(json.dumps([{**CHAT, "image": "img\\0.jpg"}]))
    assert "backslashes" in details(source)[0]


@pytest.mark.parametrize("image_id", [7, 7.0, "7"])
def test_a_number_in_a_name_counts_in_any_form(tmp_path: Path, image_id: Any) -> None:
    write_folder(tmp_path, {"000007.jpg": JPEG, "d.json": json.dumps([{"caption": "c", "id": image_id}]).encode()})
    assert learned(CaptionFiles("s", tmp_path / "d.json", tmp_path, image_pattern=("{id:06d}.jpg",))) == ["c"]


def test_images_of_hugging_face_are_read(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    struct = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    images = [{"bytes": JPEG, "path": None}, {"bytes": None, "path": "a.jpg"}, {"bytes": b"", "path": "b"}, None]
    columns = {"image": arrow.array(images, struct), "text": ["a cat", "a dog", "c", "d"]}
    parquet.write_table(arrow.table(columns), tmp_path / "0.parquet")
    source = Img2Dataset("s", tmp_path)
    assert learned(source) == ["a cat"]
    assert reasons(read_all(source)) == {"not_downloaded": 2, "empty_image": 1}
    assert "only the path 'a.jpg'" in details(source)[0]


def test_what_a_file_is() -> None:
    assert what_is(JPEG) == "" and what_is(b'{"a": 1}') == "" and what_is(b"") == ""
    assert "bzip2" in what_is(b"BZh91AY") and "tar archive" in what_is(b"x" * 257 + b"ustar\0")
