"""What someone with own data meets first: wrong paths, files of another kind, recipes of Windows, shards half there."""

from __future__ import annotations

import codecs
import dataclasses
import json
import unicodedata
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from megatron_vl.data.filters.options import read_filters
from megatron_vl.data.formats.documents import Document, document_shards, read_documents
from megatron_vl.data.images.decode import check_image
from megatron_vl.data.prepare.image_drops import _benchmark_hashes
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.sources.caption_files import CaptionFiles
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import ConfigError, DataError, SkipSample
from tests.helpers.data.prepared import png
from tests.helpers.data.reading import JPEG, details, learned, pair, read_all, write_folder, write_tar


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "1.parquet.gz"])
def test_a_compressed_shard_beside_the_others_is_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "0.tar", [*pair("0").items()])
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=rf"{name}: is not read; it is compressed with gzip"):
        Img2Dataset("s", tmp_path).shards()


def test_compressed_lines_beside_the_others_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jsonl": b'{"text": "a"}', "b.jsonl.gz": b"\x1f\x8b"})
    for source in (Text("t", tmp_path), CaptionFiles("p", tmp_path, tmp_path)):
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: is not read; it is compressed with gzip"):
            source.shards()


@pytest.mark.parametrize("beside", ["", "a/", "0.tar"])
def test_what_lies_deeper_is_no_silent_loss(tmp_path: Path, beside: str) -> None:
    """Of two folders of images, one a level deeper, that one was neither read nor counted."""
    if beside == "0.tar":
        write_tar(tmp_path / "0.tar", [*pair("0").items()])
    elif beside:
        write_folder(tmp_path / beside, pair("0"))
    write_folder(tmp_path / "b" / "c", pair("1"))
    with pytest.raises(DataError, match=r"b/c/1\.jpg: lies deeper than is looked"):
        Img2Dataset("s", tmp_path).shards()
    (tmp_path / "b" / "c" / "1.jpg").unlink()
    if beside:
        assert learned(Img2Dataset("s", tmp_path)) == ["0"]


def test_a_folder_of_something_else_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.heic": b"", "a.txt": b"", "data.arrow": b"", ".hidden": b""})
    with pytest.raises(DataError, match=r"no folder of images \(\.jpg, .*\); it holds a\.heic, a\.txt, data\.arrow$"):
        Img2Dataset("s", tmp_path).shards()
    (tmp_path / "b.jpg").write_bytes(JPEG)
    assert "0/a: members: ['txt'], not read: heic" in details(Img2Dataset("s", tmp_path))[0].replace(tmp_path.name, "0")
    with pytest.raises(DataError, match=r"no \.jsonl file in this folder; it holds a\.heic"):
        Text("t", tmp_path).shards()
    with pytest.raises(DataError, match=r"is a folder, expected a file"):
        LLaVA("s", tmp_path, tmp_path).shards()
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(DataError, match=r"metadata\.csv: .*a table with commas is not read"):
        CaptionFiles("p", tmp_path / "metadata.csv", tmp_path).shards()


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tif", "tiff"])
def test_images_of_other_kinds_are_images(tmp_path: Path, suffix: str) -> None:
    """What can be decoded was no image by its name, and its text was left out as one without."""
    write_folder(tmp_path, {f"0.{suffix}": JPEG, "0.txt": b"a cat"})
    assert learned(Img2Dataset("s", tmp_path)) == ["a cat"]


def test_a_record_is_named_by_its_line(tmp_path: Path) -> None:
    """Line 2, which is bad, and line 3 had one key."""
    write_folder(tmp_path, {"0.jpg": JPEG, "p.jsonl": b'{"image": "0.jpg", "caption": "a"}\n{\n{"caption": "b"}\n'})
    source = CaptionFiles("p", tmp_path / "p.jsonl", tmp_path)
    assert [item.key for item in read_all(source)] == ["p.jsonl:1", "p.jsonl:2", "p.jsonl:3"]
    assert "line 1 column 2" in details(source)[0] and "(image_pattern)" in details(source)[1]


def test_lines_where_a_key_is_expected_are_refused_with_the_option(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"image": "0.jpg", "question": "q", "answer": word}) + "\n" for word in "ab")
    write_folder(tmp_path, {"0.jpg": JPEG, "q.jsonl": lines.encode(), "q.json": lines.encode()})
    for name in ("q.jsonl", "q.json"):
        source = VQA("v", tmp_path / name, tmp_path, image_pattern=("{image}",), answer_field="answer")
        with pytest.raises(DataError, match=rf"{name}: holds an object a line; .* under 'questions' \('records: \"\"'"):
            source.shards()
        assert learned(dataclasses.replace(source, records="")) == ["a", "b"]


def test_a_threshold_in_scientific_notation_counts(tmp_path: Path) -> None:
    assert read_filters({"min_score": "1e-3"}, "x", root=tmp_path).min_score == 0.001
    with pytest.raises(ConfigError, match="expected a number"):
        read_filters({"min_score": "low"}, "x", root=tmp_path)


def test_a_recipe_of_windows(tmp_path: Path) -> None:
    text = "sources:\r\n  - {name: t, type: text, path: t.jsonl}\r\nnum_queries: 4\r\nnum_bpe_tokens: 2000\r\n"
    for data in (text.encode(), codecs.BOM_UTF8 + text.encode()):
        (tmp_path / "r.yaml").write_bytes(data)
        assert load_recipe(tmp_path / "r.yaml").sources[0].source.name == "t"
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"r\.yaml: no UTF-8 .*; save it as UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_lines_that_lie_deeper_are_no_silent_loss(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jsonl": b'{"text": "a"}', "b/c.jsonl": b'{"text": "c"}', "b/.c.jsonl": b""})
    for source in (Text("t", tmp_path), CaptionFiles("p", tmp_path, tmp_path)):
        with pytest.raises(DataError, match=r"b/c\.jsonl: lies deeper than is looked"):
            source.shards()
    (tmp_path / "b" / "c.jsonl").unlink()
    assert learned(Text("t", tmp_path)) == ["a"]


def test_documents_in_folders_of_a_zip_are_found(tmp_path: Path) -> None:
    """``zip -r a.zip docs``: what does not lie at the top of an archive was passed over."""
    names = ["docs/a.pdf", "docs/b/C.PDF", "d.pdf", "__MACOSX/docs/._a.pdf", "docs/.e.pdf"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    shards = document_shards(tmp_path, (".pdf",), 2)
    documents = [item for shard in shards for item in read_documents(shard, (".pdf",))]
    assert [item.key for item in documents] == ["a.zip/d.pdf", "a.zip/docs/a.pdf", "a.zip/docs/b/C.PDF"]
    assert all(isinstance(item, Document) and item.data.decode() in names for item in documents)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_with_accents_is_found_however_it_is_spelled(tmp_path: Path, stored: Literal["NFC", "NFD"]) -> None:
    """macOS stores names with the accents apart; a JSON file from elsewhere has them together."""
    name = unicodedata.normalize(stored, "Café 한.jpg")
    named = unicodedata.normalize("NFD" if stored == "NFC" else "NFC", name)
    record = json.dumps({"image": named, "caption": "a cup"}).encode()
    write_folder(tmp_path, {name: JPEG, "p.jsonl": record})
    assert learned(CaptionFiles("p", tmp_path / "p.jsonl", tmp_path)) == ["a cup"]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<html>404", "an HTML or XML page"),
     (b"\0" * 99, "zero bytes"), (b"nothing", "none of JPEG")],
)  # fmt: skip
def test_an_image_that_is_none_is_named_as_what_it_is(data: bytes, said: str) -> None:
    with pytest.raises(SkipSample, match=f"unreadable_image: .*{said}"):
        check_image(data)


def test_a_folder_of_a_benchmark_may_hold_what_systems_leave(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": png(3, 40), ".DS_Store": b"\0", "Thumbs.db": b"\0"})
    digests, dhashes = _benchmark_hashes(tmp_path)
    assert len(digests) == len(dhashes) == 1
