"""Tar readers: img2dataset's layout with its traps, cut and hostile archives, grounded captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.formats.tars import read_tar
from megatron_vl.data.sources.grounded_caption import GroundedCaption, largest_disjoint
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.errors import DataError
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_tar

# img2dataset


def test_img2dataset_reads_gaps_unsorted_keys_and_missing_members(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar",
        [
            ("000000007.jpg", JPEG),
            ("000000007.json", json.dumps({"caption": "from json", "top_caption": "from model"}).encode()),
            ("000000007.txt", b"from txt"),
            ("000000003.webp", JPEG),
            ("000000003.json", json.dumps({"caption": "only json", "top_caption": "x"}).encode()),
            ("000000004.jpg", JPEG),
            ("000000004.txt", "only txt, été".encode()),
            ("000000005.jpg", JPEG),
            ("000000006.txt", b"no image"),
            ("000000008.jpg", b""),
            ("000000008.txt", b"empty image"),
            ("000000009.jpg", JPEG),
            ("000000009.txt", b"  \n"),
            ("000000010.jpg", JPEG),
            ("000000010.txt", b"\xff\xfe"),
        ],
    )
    items = read_all(Img2Dataset("laion", tmp_path))
    assert [(s.key, s.text) for s in kept(items)] == [
        ("00000.tar/000000007", "from txt"),
        ("00000.tar/000000003", "only json"),
        ("00000.tar/000000004", "only txt, été"),
    ]
    assert kept(items)[0].images[0].data == JPEG
    assert kept(items)[0].task == "caption"
    assert reasons(items) == {
        "no_caption": 2,
        "no_image": 1,
        "empty_image": 1,
        "bad_unicode": 1,
    }
    synthetic = kept(read_all(Img2Dataset("coco", tmp_path, caption_field=("top_caption",))))
    assert [s.text for s in synthetic] == ["from model", "x"]


def test_shards_are_the_tars_in_order(tmp_path: Path) -> None:
    for name in ("00001.tar", "00000.tar", "00000_stats.json", "00000.parquet"):
        write_tar(tmp_path / name, [("1.jpg", JPEG), ("1.txt", b"a")])
    assert [shard.name for shard in Img2Dataset("s", tmp_path).shards()] == ["00000.tar", "00001.tar"]
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        Img2Dataset("s", tmp_path / "nowhere").shards()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.tar, no \.parquet and no folder"):
        Img2Dataset("s", tmp_path / "empty").shards()


def records(count: int) -> list[tuple[str, bytes]]:
    return [
        (f"{i:09d}.{suffix}", data) for i in range(count) for suffix, data in (("jpg", JPEG * 99), ("txt", b"text"))
    ]


@pytest.mark.parametrize("cut", range(0, 20480, 487))
def test_a_tar_cut_anywhere_is_said_and_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "00000.tar", records(5))
    whole = path.read_bytes()
    marker = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[:cut])
    items = read_all(Img2Dataset("s", tmp_path))
    assert all(sample.images[0].data == JPEG * 99 for sample in kept(items))
    assert {sample.text for sample in kept(items)} <= {"text"}
    complete = cut // (marker // 5)
    assert min(complete, 5) <= len(kept(items)) <= 5
    if cut < marker:
        assert reasons(items)["truncated_tar"] == 1, "the cut is counted"
        assert "00000.tar" in next(i.detail for i in items if isinstance(i, Skipped) and i.reason == "truncated_tar")


def test_a_whole_tar_is_not_called_truncated(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", records(5))
    items = read_all(Img2Dataset("s", tmp_path))
    assert len(kept(items)) == len(items) == 5


def test_a_file_that_is_no_tar_is_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"<html>not found</html>" * 100)
    assert reasons(read_all(Img2Dataset("s", tmp_path))) == {"truncated_tar": 1}


def test_dangerous_members_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes = JPEG, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data))

        for key, link in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            add(f"{key}.jpg", kind=link, link="/etc/passwd")
            add(f"{key}.txt", b"caption")
        add("../up.jpg")
        add("../up.txt", b"caption")
        add("/root.jpg")
        add("/root.txt", b"caption")
        add("bad\udcff.jpg")
        add("bad\udcff.txt", b"caption")
        add("code.pkl", b"cos\nsystem\n(S'false'\ntR.")
        add("code.jpg")
        add("code.txt", b"harmless: the pickle is never opened")
    items = read_all(Img2Dataset("s", tmp_path))
    assert [sample.key for sample in kept(items)] == ["00000.tar/code"]
    assert reasons(items) == {"not_a_regular_file": 3, "unsafe_member_name": 3}
    assert list(next(r for r in read_tar(path) if r.key == "code").members) == ["jpg", "txt"]
    assert all(item.key.encode("utf-8") for item in items)


def test_an_oversized_member_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vl.data.formats.tars.MAX_MEMBER_BYTES", 100)
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x" * 101), ("1.txt", b"a"), ("2.jpg", b"x"), ("2.txt", b"b")])
    items = read_all(Img2Dataset("s", tmp_path))
    assert [sample.text for sample in kept(items)] == ["b"]
    assert reasons(items) == {"member_too_large": 1}


# grounded captions


def grit(caption: str, entries: list[Any]) -> list[tuple[str, bytes]]:
    meta = {"caption": caption, "ref_exps": entries, "noun_chunks": entries[:1]}
    return [("0.jpg", JPEG), ("0.json", json.dumps(meta).encode()), ("0.txt", caption.encode())]


def test_grounded_caption_keeps_a_largest_set_of_phrases_and_merges_boxes(tmp_path: Path) -> None:
    caption = "a wire hanger with a paper cover"
    entries = [
        [19.0, 32.0, 0.02, 0.31, 0.96, 0.96, 0.79],
        [0, 32, 0.02, 0.03, 0.96, 0.97, 0.67],
        [0, 13, 0.1, 0.1, 0.4, 0.4, 0.7],
        [19, 32, 0.5, 0.5, 1.2, 0.9, 0.9],
    ]
    write_tar(tmp_path / "0.tar", grit(caption, entries))
    (sample,) = kept(read_all(GroundedCaption("grit", tmp_path)))
    assert sample.text == caption
    assert [(r.text, r.span) for r in sample.regions] == [
        ("a wire hanger", (0, 13)),
        ("a paper cover", (19, 32)),
    ]
    assert sample.regions[1].boxes == ((0.02, 0.31, 0.96, 0.96), (0.5, 0.5, 1.0, 0.9)), "clipped to the image"
    (strict,) = kept(read_all(GroundedCaption("grit", tmp_path, min_score=0.75)))
    assert [(r.text, len(r.boxes)) for r in strict.regions] == [("a paper cover", 2)]
    (chunks,) = kept(read_all(GroundedCaption("grit", tmp_path, phrases="noun_chunks")))
    assert len(chunks.regions) == 1


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([0, 99, 0.1, 0.1, 0.2, 0.2, 1], "bad_span"),
        ([3, 3, 0.1, 0.1, 0.2, 0.2, 1], "bad_span"),
        ([0, 3, 0.2, 0.1, 0.2, 0.2, 1], "bad_box"),
        ([0, 3, float("nan"), 0.1, 0.2, 0.2, 1], "bad_box"),
        ([0, 3, 0.1, 0.1, 0.2, 0.2], "bad_region"),
    ],
)
def test_a_bad_region_skips_its_record(tmp_path: Path, entry: list[Any], reason: str) -> None:
    write_tar(tmp_path / "0.tar", grit("a red star", [entry]))
    assert reasons(read_all(GroundedCaption("grit", tmp_path))) == {reason: 1}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)).map(lambda t: (t[0], t[0] + t[1])), max_size=7))
def test_largest_disjoint_is_disjoint_and_as_large_as_any(spans: list[tuple[int, int]]) -> None:
    def best(rest: list[tuple[int, int]], end: int) -> int:
        return max((1 + best(rest[i + 1 :], b) for i, (a, b) in enumerate(rest) if a >= end), default=0)

    chosen = largest_disjoint(spans)
    assert set(chosen) <= set(spans)
    assert all(a[1] <= b[0] for a, b in zip(chosen, chosen[1:], strict=False))
    assert len(chosen) == best(sorted(spans), 0)
