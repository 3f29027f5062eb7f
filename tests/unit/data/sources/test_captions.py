"""Caption sets in their published forms: golden samples, and an account of every caption that was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.registry import build_source
from megatron_vl.errors import DataError
from tests.helpers.data import published_captions as published
from tests.helpers.data.published_captions import Download, picture
from tests.helpers.data.published_vqa import zip_folder
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_json, write_tar

WRITERS = {
    "webdataset": published.write_webdataset,
    "files": published.write_files,
    "parquet": published.write_parquet,
}


def source_of(type_name: str, folder: Path, **options: Any) -> Source:
    return build_source({"name": "set", "type": type_name, **options}, where="recipe", root=folder)


def texts(items: list[Sample | Skipped]) -> list[tuple[str, str, float | None]]:
    """Key without the shard, caption, score: what does not depend on the container."""
    return sorted((s.key.rpartition("/")[2], s.text, s.score) for s in kept(items))


# img2dataset


@pytest.mark.parametrize("container", WRITERS)
def test_laion_en(tmp_path: Path, container: str) -> None:
    WRITERS[container](tmp_path, published.laion_en())
    items = read_all(source_of("laion_en", tmp_path, path="."))
    expected = [
        ("000000003", "Vintage brass lamp &amp; shade", 0.31274),
        ("000000007", "Red kettle on gas stove", 0.3312),
        ("000000008", "no metadata", None if container != "parquet" else 0.35),
        ("000000009", "A PNG under .jpg", None),
        ("000000012", "cut", 0.4),
    ]
    assert texts(items) == expected
    lost = {"no_caption": 1} if container != "parquet" else {"no_caption": 1, "not_downloaded": 1}
    assert reasons(items) == lost
    assert len(items) == len(published.laion_en()) - (container != "parquet"), "failures are in parquet alone"
    images = {s.key.rpartition("/")[2]: s.images[0].data for s in kept(items)}
    assert images["000000009"] == picture(9, "PNG"), "bytes as they were found, whatever the suffix"
    assert {(s.task, s.language, s.source, s.question) for s in kept(items)} == {("caption", "en", "set", "")}


def test_laion_zh(tmp_path: Path) -> None:
    published.write_webdataset(tmp_path, published.laion_zh())
    (sample,) = read_all(source_of("laion_zh", tmp_path, path="00000.tar"))
    assert isinstance(sample, Sample)
    assert (sample.key, sample.text, sample.language, sample.score) == (
        "00000.tar/000000001",
        "不锈钢保温杯 500ml 厂家直销",
        "zh",
        0.2871,
    )


@pytest.mark.parametrize("container", WRITERS)
def test_laion_coco_learns_the_synthetic_caption_and_never_the_alt_text(tmp_path: Path, container: str) -> None:
    WRITERS[container](tmp_path, published.laion_coco())
    items = read_all(source_of("laion_coco", tmp_path, path="."))
    assert texts(items) == [("000000000", "a brown dog lying on a grey sofa", 0.331)]
    assert reasons(items) == {"no_caption": 1}
    every = read_all(source_of("laion_coco", tmp_path, path=".", caption_field="all_captions", captions="all"))
    assert texts(every) == [
        ("000000000#0", "a brown dog lying on a grey sofa", 0.331),
        ("000000000#1", "dog on couch", 0.297),
    ]
    assert len(every) == 3


def test_datacomp_and_coyo(tmp_path: Path) -> None:
    published.write_webdataset(tmp_path / "datacomp", published.datacomp(), shard="00000000", digits=12)
    assert texts(read_all(source_of("datacomp", tmp_path, path="datacomp"))) == [
        ("000000000000", "Case cover for phone", None),
        ("000000000001", "Oak table", 0.2217),
    ]
    published.write_webdataset(tmp_path / "coyo", published.coyo())
    caption = "Fishing fleet, valentine&amp;#39;s day"
    assert texts(read_all(source_of("coyo", tmp_path, path="coyo"))) == [("000000000", caption, 0.3021)]


@pytest.mark.parametrize("name", ["cc12m", "cc3m", "sbu"])
def test_sets_without_scores(tmp_path: Path, name: str) -> None:
    published.write_webdataset(tmp_path, [Download(0, "Portrait of <PERSON>\tat the gallery\n2015")])
    assert texts(read_all(source_of(name, tmp_path, path="."))) == [
        ("000000000", "Portrait of <PERSON>\tat the gallery\n2015", None)
    ]


@pytest.mark.parametrize("score", [float("nan"), "NaN", " ", None])
def test_a_score_that_says_nothing_is_none(tmp_path: Path, score: Any) -> None:
    published.write_files(tmp_path, [Download(0, "a kettle", {"similarity": score})])
    assert texts(read_all(source_of("laion_en", tmp_path, path="."))) == [("000000000", "a kettle", None)]


def test_shards_of_every_container_come_in_order(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        for shard in ("00001", "00000"):
            write(tmp_path / name, [Download(int(shard), "a")], shard=shard)
    for name, suffix in {"webdataset": ".tar", "files": "", "parquet": ".parquet"}.items():
        shards = source_of("sbu", tmp_path, path=name).shards()
        assert [shard.name for shard in shards] == [f"00000{suffix}", f"00001{suffix}"]
    assert texts(read_all(source_of("sbu", tmp_path, path="files/00001"))) == [("000000001", "a", None)]


def test_tars_beside_folders_of_images_are_refused(tmp_path: Path) -> None:
    published.write_webdataset(tmp_path, [Download(0, "a")])
    published.write_files(tmp_path, [Download(1, "b")], shard="00001")
    with pytest.raises(DataError, match=r"both tars and folders of images \(00001\)"):
        source_of("sbu", tmp_path, path=".").shards()


def test_hostile_members_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = published.write_files(tmp_path / "set", [Download(n, f"caption {n}") for n in range(6)]) / "00000"
    (folder / "000000000.txt").unlink()
    (folder / "000000000.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "000000001.json").write_text('{"caption": ')
    (folder / "000000002.jpg").write_bytes(b"")
    (folder / "000000003.jpg").unlink()
    (folder / "000000004.txt").write_bytes(b"\xff\xfe")
    (folder / "notes.md").write_text("no member of a record")
    items = read_all(source_of("sbu", tmp_path, path="set"))
    assert texts(items) == [("000000005", "caption 5", None)]
    lost = ("image_outside_root", "bad_json", "empty_image", "no_image", "bad_unicode")
    assert reasons(items) == dict.fromkeys(lost, 1)
    assert len(items) == 6


def test_captions_with_half_a_character_are_skipped(tmp_path: Path) -> None:
    metadata = Download(0, "x", {"top_caption": "half \ud83d a face"}).metadata(9)
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.json", json.dumps(metadata).encode())])
    assert reasons(read_all(source_of("laion_coco", tmp_path, path="."))) == {"bad_unicode": 1}


# Karpathy's COCO


def test_coco_caption(tmp_path: Path) -> None:
    published.write_karpathy(tmp_path)
    items = read_all(source_of("coco_caption", tmp_path, path="dataset_coco.json", image_root="."))
    first = "train2014/COCO_train2014_000000057870.jpg"
    assert [(s.key, s.text, s.images[0].key) for s in kept(items)] == [
        (f"{first}#0", "A restaurant has modern wooden tables.", first),
        (f"{first}#1", "Long table", first),
        (
            "val2014/COCO_val2014_000000522418.jpg",
            "A woman cuts a large white sheet cake.",
            "val2014/COCO_val2014_000000522418.jpg",
        ),
    ]
    assert reasons(items) == {"empty_text": 1, "other_split": 2, "missing_image": 2}
    assert len(items) == 8, "every sentence is accounted for"


def test_flickr30k_names_neither_folder_nor_coco_id(tmp_path: Path) -> None:
    sentence = {"raw": "Two friends stand in a yard.", "imgid": 0, "sentid": 0, "tokens": ["two", "friends"]}
    image = {"sentids": [0], "imgid": 0, "sentences": [sentence], "split": "train", "filename": "1000092795.jpg"}
    write_json(tmp_path / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    (tmp_path / "1000092795.jpg").write_bytes(JPEG)
    items = read_all(source_of("karpathy", tmp_path, path="dataset_flickr30k.json", image_root="."))
    assert [(s.key, s.text) for s in kept(items)] == [("1000092795.jpg", "Two friends stand in a yard.")]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("longest", "a longer one"), ("first", "one"), ("all", ["one", "a longer one", "a long one"])],
)
def test_choice_of_several_captions(tmp_path: Path, choice: str, expected: str | list[str]) -> None:
    (tmp_path / "1.jpg").write_bytes(JPEG)
    record = {"image": "1.jpg", "caption": [None, "one", "a longer one", True, "a long one"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    items = read_all(source_of("pairs", tmp_path, path="pairs.jsonl", image_root=".", captions=choice))
    found = [sample.text for sample in kept(items)]
    assert found == ([expected] if isinstance(expected, str) else expected)
    lost = {"no_caption": 1, "wrong_field": 1} | ({"other_caption": 2} if choice != "all" else {})
    assert reasons(items) == lost
    assert len(items) == 5


def test_karpathy_from_the_zips_as_downloaded(tmp_path: Path) -> None:
    published.write_karpathy(tmp_path / "raw")
    zip_folder(tmp_path / "raw", tmp_path / "caption_datasets.zip", ["dataset_coco.json"])
    for part in ("train2014", "val2014"):
        zip_folder(tmp_path / "raw", tmp_path / f"{part}.zip", [part])
    unpacked = read_all(source_of("coco_caption", tmp_path / "raw", path="dataset_coco.json", image_root="."))
    packed = read_all(
        source_of("coco_caption", tmp_path, path="caption_datasets.zip/dataset_coco.json", image_root=".")
    )
    assert [(s.text, s.images[0].data) for s in kept(packed)] == [(s.text, s.images[0].data) for s in kept(unpacked)]
    assert reasons(packed) == reasons(unpacked)


# pairs named by path


def test_in_house_pairs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(JPEG)
    lines = [
        {"image": "a/1.jpg", "caption": "红色的水壶", "clip": 0.31},
        {"image": "a/1.jpg", "caption": "a red kettle", "lang": "en"},
        {"image": "a/1.jpg", "caption": None},
        {"image": "a/2.jpg", "caption": "missing"},
        {"image": "../a/1.jpg", "caption": "outside"},
        {"caption": "no image"},
        {"image": "a/1.jpg", "caption": "half \ud83d"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*map(json.dumps, lines), "{broken"]) + "\n")
    source = source_of(
        "pairs", tmp_path, path="pairs.jsonl", image_root=".", language="zh", score_field="clip", records_per_shard=3
    )
    items = read_all(source)
    assert [(s.key, s.text, s.language, s.score) for s in kept(items)] == [
        ("pairs.jsonl:1", "红色的水壶", "zh", 0.31),
        ("pairs.jsonl:2", "a red kettle", "en", None),
    ]
    lost = ("no_caption", "missing_image", "image_outside_root", "missing_field", "bad_unicode", "bad_json")
    assert reasons(items) == dict.fromkeys(lost, 1)
    assert len(items) == 8


@pytest.mark.parametrize("header", [False, True])
def test_cc3m_as_published_with_images_stored_by_line(tmp_path: Path, header: bool) -> None:
    rows = [
        'a "very typical bus station at night .\thttp://lh6.ex.com/-IvRt/s640/IMG.JPG',
        "three\tfields\thttp://x.ex/1.jpg",
        "person at the lake\thttp://x.ex/2.jpg",
        "dead address\thttp://x.ex/3.jpg",
    ]
    (tmp_path / "cc3m.tsv").write_text("\n".join((["caption\turl"] if header else []) + rows) + "\n")
    for line in (0, 2):
        (tmp_path / f"GCC_train_{line:09d}.jpg").write_bytes(picture(line))
    options = {"columns": ["caption", "url"], "image_pattern": "GCC_train_{line:09d}.jpg", "records_per_shard": 2}
    items = read_all(source_of("pairs", tmp_path, path="cc3m.tsv", image_root=".", **options))
    assert [(s.key, s.text, s.images[0].data) for s in kept(items)] == [
        (f"cc3m.tsv:{1 + header}", 'a "very typical bus station at night .', picture(0)),
        (f"cc3m.tsv:{3 + header}", "person at the lake", picture(2)),
    ]
    assert reasons(items) == {"bad_line": 1, "missing_image": 1}


def test_sbu_as_published_with_images_stored_by_number(tmp_path: Path) -> None:
    captions = ["Interior design of modern white and brown living room", None]
    addresses = ["http://static.flickr.ex/1.jpg", "http://static.flickr.ex/2.jpg"]
    write_json(
        tmp_path / "sbu-captions-all.json",
        {"image_urls": addresses, "user_ids": ["47889917@N08"] * 2, "captions": captions},
    )
    for line in range(2):
        (tmp_path / f"{line}.jpg").write_bytes(JPEG)
    options = {"records": "captions", "image_pattern": "{line}.jpg"}
    items = read_all(source_of("pairs", tmp_path, path="sbu-captions-all.json", image_root=".", **options))
    assert [(s.text, s.images[0].key) for s in kept(items)] == [(captions[0], "0.jpg")]
    assert reasons(items) == {"no_caption": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a.csv"}, r"a\.csv: expected a file that ends in \.jsonl, \.tsv, \.json"),
        ({"path": "a.tsv"}, r"columns are \[\], expected names .* 'caption' among them"),
        ({"path": "empty"}, r"empty: no \.jsonl and no \.tsv"),
        ({"path": "a.jsonl", "image_root": "none"}, r"none: no such folder; expected the folder, or the \.zip"),
        ({"path": "a.jsonl", "image_pattern": "{"}, r"set: image_pattern '\{'"),
        ({"path": "a.jsonl", "image_pattern": "1.jpg"}, r"'1\.jpg' names no field"),
        ({"path": "a.jsonl", "image_pattern": "{image.__class__}"}, "names no field"),
    ],
)
def test_pairs_that_cannot_work_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        source_of("pairs", tmp_path, **{"image_root": ".", **options}).shards()
