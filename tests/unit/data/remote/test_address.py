"""Addresses as paths: what is refused, what a store is asked, and what a change of a file changes."""

from __future__ import annotations

import copy
import errno
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megatron_vl.data.formats.image_files import read_bytes
from megatron_vl.data.remote.address import Address, Entry
from megatron_vl.data.remote.places import below, open_whole, place_of, state_of
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data.remote import FailingStore, in_memory, no_pauses, use

__all__ = ["no_pauses"]
FILES = {"a.txt": b"first", "b.txt": b"", "refs(unc).p": b"p", "sub/c.txt": b"third", "sub/deep/d.bin": b"4"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Address]:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with in_memory(tmp_path, "addresses") as address:
        yield Address.parse(address)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "s4://b/k",
            "s4://b/k: unknown protocol 's4'; known are az, gs, hf, memory, oss, s3. Copy the files to a disk",
        ),
        ("https://h/a.tar", "https://h/a.tar: web servers have no list of their files; download it first"),
        ("zip://a::s3://b/c.zip", "chained addresses are not read"),
        ("s3://b//k", "has a part that is empty, . or .., expected s3://NAME/NAME"),
        ("s3://b/../k", "has a part that is empty, . or .."),
        ("s3://", "has a part that is empty"),
        ("file://host/a", "expected file:///FOLDER/FILE"),
        ("file:a", "expected file:///FOLDER/FILE"),
    ],
)
def test_addresses_that_are_not_read(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        place_of(Path("/raw"), text)


def test_where_paths_of_a_recipe_start() -> None:
    bucket = Address.parse("s3://b/raw")
    assert place_of(Path("/raw"), "a/b") == Path("/raw/a/b")
    assert place_of(Path("/raw"), "/a/b") == place_of(bucket, "/a/b") == Path("/a/b")
    assert place_of(Path("/raw"), "file:///a%20b/c") == Path("/a b/c")
    assert str(place_of(bucket, "a/b.tar")) == "s3://b/raw/a/b.tar"
    assert str(place_of(Path("/raw"), "gs://other/a/")) == "gs://other/a"
    assert not isinstance(place_of(Path("/raw"), "file:///a"), Address), "the disk is read without fsspec"


def test_an_address_is_a_path() -> None:
    path = Address.parse("s3://b/raw/x.tar")
    assert (path.name, path.suffix, path.stem) == ("x.tar", ".tar", "x")
    assert [str(parent) for parent in path.parents] == ["s3://b/raw", "s3://b", "s3:", "."]
    assert str(path.parent / "y" / "z.zip") == "s3://b/raw/y/z.zip"
    assert path.relative_to(path.parent).as_posix() == "x.tar"
    for twin in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):  # noqa: S301  our own
        assert twin == path and hash(twin) == hash(path) and str(twin) == str(path) and isinstance(twin, Address)
    assert str(Address.parse("s3://b/c:/d").relative_to(Address.parse("s3://b"))) == "c:/d"


def test_what_needs_a_disk_says_so() -> None:
    with pytest.raises(DataError, match="^s3://b/k: an address is not read here, expected a path on a disk; copy it"):
        open(Address.parse("s3://b/k"), "rb")  # noqa: SIM115  it is refused
    with pytest.raises(DataError, match="^s3://b/k: nothing is written to an address"):
        Address.parse("s3://b/k").open("wb")


def test_what_lies_in_a_store(folder: Address) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt", "refs(unc).p", "sub"]
    assert {str(path): path.stat().st_size for path in folder.rglob("*")} == {
        f"memory://addresses/{name}": len(data) for name, data in FILES.items()
    }
    assert [path.name for path in folder.rglob("*.bin")] == ["d.bin"]
    assert [str(path) for path in folder.glob("refs(*).p")] == [f"{folder}/refs(unc).p"]
    assert [str(path) for path in folder.glob("*/*.txt")] == [f"{folder}/sub/c.txt"]
    assert (folder / "sub").is_dir() and not (folder / "sub").is_file()
    assert (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir()
    for absent in (folder / "z", folder / "a.txt/z", folder.parent.parent, Address("memory:")):
        assert not absent.exists() and not absent.is_dir() and not absent.is_file(), absent
    assert (folder / "a.txt").read_bytes() == b"first" and (folder / "a.txt").read_text(encoding="utf-8") == "first"
    with (folder / "b.txt").open("rb") as stream:
        assert stream.read() == b""
    with pytest.raises(FileNotFoundError):
        (folder / "z").open("rb")
    with pytest.raises(IsADirectoryError):
        (folder / "sub").open("rb")


def test_a_change_of_a_file_changes_its_state(folder: Address) -> None:
    listed = {path.name: path for path in folder.iterdir()}
    before = {path.name: state_of(path) for path in folder.iterdir()}
    assert before["a.txt"] == state_of(folder / "a.txt"), "a listing says the same as a question"
    assert state_of(folder / "z") is None
    fsspec.filesystem("memory").pipe_file("/addresses/a.txt", b"FIRST")
    fsspec.filesystem("memory").pipe_file("/addresses/sub/c.txt", b"THIRD")
    after = {path.name: state_of(path) for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"a.txt", "sub"}
    assert before["a.txt"][0] == after["a.txt"][0] == 5, "the size is the same"  # type: ignore[index]
    with pytest.raises(DataError, match="^memory://addresses/a.txt: was changed while it was read; start again"):
        pickle.loads(pickle.dumps(listed["a.txt"])).open("rb")  # noqa: S301  our own
    assert listed["b.txt"].open("rb").read() == b""


def test_a_store_that_tells_no_time_is_refused(folder: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FailingStore):
        def info(self, path: str, **options: object) -> dict[str, object]:
            return {"name": path, "size": 5, "type": "file"}

    use(Silent(), monkeypatch)
    with pytest.raises(DataError, match="a.txt: the store tells no size, or neither tag nor time of it; copy it"):
        (folder / "a.txt").stat()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", "a/b.jpg"), ("./a.jpg", "a.jpg"), ("a/../b.jpg", "b.jpg"), ("..a.jpg", "..a.jpg"),
        ("../b.jpg", None), ("a/../../b.jpg", None), ("/b.jpg", None), ("", None), ("..", None), ("a\0b", None),
        ("s3://other/a.jpg", None),
    ],
)  # fmt: skip
def test_names_of_images_lead_nowhere_else(name: str, expected: str | None) -> None:
    found = below(Address.parse("s3://b/images"), name)
    assert (found and str(found)) == (expected and f"s3://b/images/{expected}")


def test_images_by_full_address_and_in_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"train/{number}.jpg", bytes([number]) * 100)
    (tmp_path / "1.jpg").write_bytes(b"one")
    with in_memory(tmp_path, "images") as text:
        root, asked = Address.parse(text), use(FailingStore(), monkeypatch)
        assert read_bytes(root, "1.jpg") == read_bytes(root, f"{text}/1.jpg") == b"one"
        for name, reason in [
            ("../1.jpg", "image_outside_root"),
            ("s3://b/1.jpg", "image_is_url"),
            ("2.jpg", "missing_image"),
        ]:
            with pytest.raises(SkipSample) as error:
                read_bytes(root, name)
            assert error.value.reason == reason
        for number in range(5):
            assert read_bytes(root, f"z.zip/train/{number}.jpg") == bytes([number]) * 100
        assert asked.num_requests == 3, "a request for each image, and one for the whole zip"
        with pytest.raises(SkipSample, match="missing_image"):
            read_bytes(root / "z.zip", "train/9.jpg")


@pytest.mark.usefixtures("no_pauses")
def test_a_file_is_read_on_where_the_connection_broke(folder: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    reset = ConnectionResetError("reset")
    failing = use(FailingStore(reset, reset, reset), monkeypatch)
    with open_whole(folder / "a.txt") as stream:
        assert stream.read() == b"first"
    assert failing.num_requests == 4
    use(FailingStore(*[reset] * 4), monkeypatch)
    with pytest.raises(DataError, match=r"^memory://addresses/a.txt: cannot read it from byte 0 on, in 4 attempts"):
        open_whole(folder / "a.txt")


def test_a_tar_that_does_not_fit_into_the_temporary_folder_is_named(
    folder: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        DataError, match=r"^memory://addresses/a.txt: 5 bytes do not fit into .*; let TMPDIR name a folder"
    ):
        open_whole(folder / "a.txt")


def test_entries_have_a_size_and_an_identity(folder: Address) -> None:
    entry = (folder / "a.txt").entry()
    assert entry == Entry(is_folder=False, size=5, identity=entry.identity) and entry.identity
    assert (folder / "sub").entry() == Entry(is_folder=True)
