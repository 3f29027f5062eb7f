"""Raw data at addresses: the same samples and bytes as from the disk, and what happens if a store changes or fails."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from megatron_vl.cli.prepare import output_prefix
from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.formats.documents import Document, document_shards, read_documents
from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.formats.warc import WARC_SUFFIXES, read_warc
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.parts import plan_units
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe, without_missing
from megatron_vl.data.remote.address import Address
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.registry import build_source
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data import published_grounding as grounding
from tests.helpers.data import published_vqa as questions
from tests.helpers.data.jobs import hashes
from tests.helpers.data.prepared import recipe_values, write_raw, write_recipe
from tests.helpers.data.published_captions import picture
from tests.helpers.data.reading import kept, read_all, write_json
from tests.helpers.data.remote import FailingStore, in_memory, no_pauses, use
from tests.unit.data.prepare.test_published import SETS, write_downloads

__all__ = ["no_pauses"]


def told(items: Sequence[Sample | Skipped | Document], root: str) -> list[Any]:
    """What a reader yields, without the place of the files in details."""
    return [
        dataclasses.replace(item, detail=item.detail.replace(root, "ROOT")) if isinstance(item, Skipped) else item
        for item in items
    ]


def sources(entries: dict[str, dict[str, Any]], root: Path) -> list[Source]:
    named = [{"name": name, "type": name, **entry} for name, entry in entries.items()]
    return [build_source(entry, where="recipe", root=root) for entry in named]


def recipe_at(folder: Path, root: str | None = None, **changes: Any) -> DataRecipe:
    return load_recipe(write_recipe(folder, **changes), root=root)


def compare(entries: dict[str, dict[str, Any]], folder: Path) -> None:
    """Every source gives from a store what it gives from the disk, shard by shard."""
    with in_memory(folder, "compared") as address:
        for local, remote in zip(sources(entries, folder), sources(entries, Address.parse(address)), strict=True):
            here, there = read_all(local), read_all(remote)
            assert kept(here) and told(there, address) == told(here, str(folder)), local.name
            assert [shard.name for shard in remote.shards()] == [shard.name for shard in local.shards()]


def test_published_sets_of_captions_and_questions_are_read_alike(tmp_path: Path) -> None:
    write_downloads(tmp_path)
    compare(SETS, tmp_path)


def test_sets_in_zips_are_read_alike(tmp_path: Path) -> None:
    questions.write_gqa(tmp_path)
    questions.zip_folder(tmp_path, tmp_path / "images.zip", ["images"])
    questions.zip_folder(tmp_path, tmp_path / "q.zip", ["train_balanced_questions.json"])
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    inside = "q.zip/train_balanced_questions.json"
    compare({"gqa": {"questions": inside, "image_root": "."}}, tmp_path)
    compare(
        {"gqa": {"questions": inside, "image_root": "images.zip", "image_pattern": "images/{imageId}.jpg"}}, tmp_path
    )


def test_grounding_tables_and_lines_are_read_alike(tmp_path: Path) -> None:
    grounding.write_refer(tmp_path, "refcoco", "unc", 4)
    questions.write_images(tmp_path, [f"train2014/COCO_train2014_{number:012d}.jpg" for number in range(4)])
    (tmp_path / "pairs.tsv").write_text("a cat\t1.jpg\na dog\t2.jpg\n", encoding="utf-8")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(picture(int(name[0])))
    lines = [{"texts": ["A cat.", None], "images": [None, "1.jpg"]}, {"texts": ["x"], "images": [None]}]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = {"file_name": "1.jpg", "ground_truth": json.dumps({"gt_parse": {"text_sequence": "words"}})}
    write_json(tmp_path / "metadata.jsonl", page)
    columns = {"columns": ["caption", "url"], "image_pattern": "{url}", "header": False}
    compare(
        {
            "refcoco": {"path": "refcoco", "image_root": "."},
            "pairs": {"path": "pairs.tsv", "image_root": ".", **columns},
            "interleaved": {"path": "lines", "image_root": "."},
            "ocr": {"path": ".", "question": "What is written?"},
        },
        tmp_path,
    )


def test_documents_and_crawls_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.pdf").write_bytes(b"%PDF a")
    (tmp_path / "b.pdf").write_bytes(b"%PDF b")
    questions.zip_folder(tmp_path, tmp_path / "c.zip", ["deep"])
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>page"
    record = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%b\r\n\r\n" % (len(body), body)
    (tmp_path / "d.warc.gz").write_bytes(gzip.compress(record) + gzip.compress(record)[:-9])

    def found(root: Path) -> Iterator[Document | Skipped]:
        for shard in document_shards(root, (".pdf",), 1, WARC_SUFFIXES):
            is_crawl = shard.path.name.endswith(WARC_SUFFIXES)
            yield from read_warc(shard.path) if is_crawl else read_documents(shard, (".pdf",))

    with in_memory(tmp_path, "documents") as address:
        here = told(list(found(tmp_path)), str(tmp_path))
        place = Address.parse(address)
        assert told(list(found(place)), address) == here
    assert [type(item).__name__ for item in here] == ["Document"] * 5 + ["Skipped"]


def test_a_data_set_from_a_store_has_the_same_bytes(tmp_path: Path) -> None:
    write_raw(tmp_path)
    values = recipe_values()
    with in_memory(tmp_path, "raw") as address:
        values["sources"][1]["path"] = f"{address}/text.jsonl"
        prepare(recipe_at(tmp_path), tmp_path / "disk" / "set", progress=False)
        prepare(recipe_at(tmp_path, address), tmp_path / "store" / "set", progress=False)
        prepare(recipe_at(tmp_path, **values), tmp_path / "both" / "set", progress=False)
    values["sources"][1]["path"] = (tmp_path / "text.jsonl").as_uri()
    prepare(recipe_at(tmp_path, **values), tmp_path / "file" / "set", progress=False)
    expected = hashes(tmp_path / "disk" / "set")
    assert len(expected) == 8
    assert hashes(tmp_path / "store" / "set") == hashes(tmp_path / "both" / "set") == expected
    assert hashes(tmp_path / "file" / "set") == expected


def test_a_file_that_changes_in_the_store_makes_its_part_anew(tmp_path: Path) -> None:
    write_raw(tmp_path)
    with in_memory(tmp_path, "raw") as address:
        before = [unit.name for unit in plan_units(recipe_at(tmp_path, address))]
        assert [unit.name for unit in plan_units(recipe_at(tmp_path, address))] == before
        memory = fsspec.filesystem("memory")
        content = memory.cat_file("/raw/captions/00001.tar")
        memory.pipe_file("/raw/captions/00001.tar", content.replace(b"shade", b"SHADE"))
        after = [unit.name for unit in plan_units(recipe_at(tmp_path, address))]
        assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, True]
        memory.pipe_file("/raw/captions/00001.tar", content)
        memory.pipe_file("/raw/text.jsonl", memory.cat_file("/raw/text.jsonl") + b"\n")
        again = [unit.name for unit in plan_units(recipe_at(tmp_path, address))]
        assert [old == new for old, new in zip(before, again, strict=True)] == [True, False, True, False]


@pytest.mark.usefixtures("no_pauses")
def test_a_store_that_fails_ends_the_preparation_which_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path)
    reset = ConnectionResetError("reset")
    prepare(recipe_at(tmp_path), tmp_path / "disk" / "set", progress=False)
    with in_memory(tmp_path, "raw") as address:
        failing = use(FailingStore(reset, reset, reset), monkeypatch)
        prepare(recipe_at(tmp_path, address), tmp_path / "mended" / "set", progress=False)
        assert hashes(tmp_path / "mended" / "set") == hashes(tmp_path / "disk" / "set")
        needed = failing.num_requests - 3

        prefix = tmp_path / "later" / "set"
        failing = use(FailingStore(), monkeypatch)
        fail = failing.fail

        def third_tar_is_gone() -> None:
            fail()
            if failing.num_requests > needed - 2:
                raise reset

        monkeypatch.setattr(failing, "fail", third_tar_is_gone)
        with pytest.raises(DataError, match=r"^source 'documents': memory://raw/text.jsonl: cannot read it from"):
            prepare(recipe_at(tmp_path, address), prefix, progress=False)
        assert len(list((tmp_path / "later" / "set.parts").glob("*.npz"))) == 3
        failing = use(FailingStore(), monkeypatch)
        prepare(recipe_at(tmp_path, address), prefix, progress=False)
        assert hashes(prefix) == hashes(tmp_path / "disk" / "set")
        assert failing.num_requests < needed - 2, "the finished tars are not read again"


@pytest.mark.parametrize("suffix", ["parquet", "warc.gz", "zip"])
@pytest.mark.usefixtures("no_pauses")
def test_no_reader_takes_a_broken_connection_for_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    write_downloads(tmp_path)
    (tmp_path / "d.warc.gz").write_bytes(gzip.compress(b"WARC/1.0\r\n\r\n" * 9))
    questions.zip_folder(tmp_path, tmp_path / "coco.zip", ["coco"])
    inside = {"path": "coco.zip/coco/dataset_coco.json", "image_root": "coco.zip/coco"}
    entries: dict[str, Any] = {"parquet": {"laion_coco": {"path": "laion_coco"}}, "zip": {"coco_caption": inside}}
    with in_memory(tmp_path, "broken") as address:
        place = Address.parse(address)
        failing = use(FailingStore(), monkeypatch)
        with pytest.raises(DataError, match="in 4 attempts"):
            if suffix == "warc.gz":
                failing.failures = [ConnectionResetError("reset")] * 9
                list(read_warc(place / "d.warc.gz"))
            else:
                (source,) = sources(entries[suffix], place)
                shards = source.shards() if suffix == "parquet" else []  # a zip stays open, and its blocks are kept
                failing.failures = [ConnectionResetError("reset")] * 99
                for shard in shards or source.shards():
                    list(source.read(shard))


@pytest.mark.parametrize(
    ("root", "source", "expected"),
    [
        (None, {"path": "s4://b/k"}, r"sources\[0\]\.path: s4://b/k: unknown protocol 's4'"),
        (None, {"path": "https://h/k.jsonl"}, r"sources\[0\]\.path: https://h/k.jsonl: web servers have no list"),
        ("ftp://h", {"path": "k"}, "--root: ftp://h: unknown protocol 'ftp'"),
    ],
)
def test_addresses_that_are_not_read(tmp_path: Path, root: str | None, source: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        recipe_at(tmp_path, root, sources=[{"name": "t", "type": "text", **source}])


def test_only_raw_data_may_be_at_an_address(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the recipe: s3://b/r.yaml is an address, expected a path on a disk; copy"):
        load_recipe(Path("s3://b/r.yaml"))
    for root in (None, "s3://b"):
        with pytest.raises(ConfigError, match=r"vocab_file: s3://b/v.tiktoken is an address, expected a path"):
            recipe_at(tmp_path, root, vocab_file="v.tiktoken" if root else "s3://b/v.tiktoken")


def test_what_is_prepared_lies_on_a_disk(tmp_path: Path) -> None:
    text = r"s3://b/set is an address, expected a path on a disk; prepare there, and copy the data set"
    with pytest.raises(ConfigError, match=f"^--output: {text}"):
        output_prefix("s3://b/set", tmp_path / "r.yaml")
    for prefix in ("s3://b/set", Path("s3://b/set")):
        with pytest.raises(DataError, match="^the data set: s3://b/set is an address, expected a path on a disk; copy"):
            read_manifest(prefix)


def test_missing_addresses_are_left_out_on_request(tmp_path: Path) -> None:
    write_raw(tmp_path)
    with in_memory(tmp_path, "raw") as address:
        values = recipe_values()
        values["sources"][1]["path"] = "other.jsonl"
        recipe, lines = without_missing(recipe_at(tmp_path, address, **values))
        assert [entry.source.name for entry in recipe.sources] == ["captions"]
        assert lines == ["source documents is left out: memory://raw/other.jsonl is missing"]
        with pytest.raises(DataError, match="memory://raw/other.jsonl: no such file"):
            plan_units(recipe_at(tmp_path, address, **values))


def test_lists_of_images_and_benchmarks_may_be_at_an_address(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/1.jpg").write_bytes(picture(1))
    (tmp_path / "list.txt").write_text("0003\n", encoding="utf-8")
    with in_memory(tmp_path, "raw") as address:
        filters = {"exclude_images": f"{address}/list.txt", "benchmark_images": f"{address}/bench"}
        manifest = prepare(recipe_at(tmp_path, filters=filters), tmp_path / "set", progress=False)
    assert {skip.reason: skip.count for skip in manifest.skips} == {"excluded_image": 1}
