"""Images in zip archives: the rules of folders hold, and damaged or hostile archives are named."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from megatron_vl.data.formats.image_files import read_first_image, read_image, require_images
from megatron_vl.data.formats.zips import list_folder, open_file, split_zip
from megatron_vl.errors import DataError, SkipSample
from tests.helpers.data.published_captions import picture
from tests.helpers.data.reading import JPEG


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def reason_of(root: Path, name: str) -> str:
    with pytest.raises(SkipSample) as caught:
        read_image(root, name)
    return caught.value.reason


def test_members_are_read_by_name_from_any_depth(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "images.zip", {"a/1.jpg": picture(1), "a/b/2.jpg": picture(2)}, zipfile.ZIP_DEFLATED)
    assert read_image(archive, "a/1.jpg").data == picture(1)
    assert read_image(archive / "a", "b/2.jpg").data == picture(2)
    assert read_image(tmp_path, "images.zip/a/1.jpg").data == picture(1)
    assert read_first_image(archive, ["b/1.jpg", "a/1.jpg"]).key == "a/1.jpg"
    assert reason_of(archive, "a/3.jpg") == "missing_image"
    assert reason_of(tmp_path, "images.zip/a/3.jpg") == "missing_image"
    assert list_folder(archive / "a", ".jpg") == ["1.jpg"]
    assert split_zip(archive) == (archive, "")
    assert require_images(archive / "a") == archive / "a"


@pytest.mark.parametrize(
    ("root", "there"),
    [
        ("coco/train2017.zip/train2017", "coco/train2017"),
        ("coco/train2017.zip/train2017", "coco/train2017/train2017"),
        ("coco/train2017.zip", "coco/train2017"),
    ],
)
def test_images_that_are_unpacked_are_named_where_the_zip_is_not_there(tmp_path: Path, root: str, there: str) -> None:
    with pytest.raises(DataError, match=r"no such folder; expected the folder, or the \.zip, .*\(image_root\)$"):
        require_images(tmp_path / root)
    (tmp_path / there).mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        require_images(tmp_path / root)
    assert f"There is no train2017.zip, but the folder {tmp_path / there}: let" in str(caught.value)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg"])
def test_a_member_that_leads_out_is_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    write_zip(tmp_path / "evil.zip", {"evil.jpg": JPEG})
    archive = write_zip(tmp_path / "root" / "images.zip", {name: JPEG, "good.jpg": JPEG})
    assert reason_of(archive, name) in ("image_outside_root", "missing_image")
    assert reason_of(tmp_path / "root", "../evil.zip/evil.jpg") == "image_outside_root"
    assert read_image(archive, "good.jpg").data == JPEG


def test_links_folders_and_empty_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.mkdir("folder.jpg")
        archive.writestr("empty.jpg", b"")
    assert reason_of(path, "link.jpg") == "not_a_regular_file"
    assert reason_of(path, "folder.jpg/") == "missing_image", "a path has no slash at its end"
    assert reason_of(path, "empty.jpg") == "empty_image"


def test_a_link_to_an_archive_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    write_zip(tmp_path / "out.zip", {"1.jpg": JPEG})
    (tmp_path / "root" / "in.zip").symlink_to(tmp_path / "out.zip")
    assert reason_of(tmp_path / "root", "in.zip/1.jpg") == "image_outside_root"


def test_a_bomb_is_not_inflated_beyond_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vl.data.formats.image_files.MAX_IMAGE_BYTES", 1000)
    archive = write_zip(tmp_path / "a.zip", {"1.jpg": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 2000
    assert reason_of(archive, "1.jpg") == "member_too_large"


def test_damage_is_the_fault_of_the_member(tmp_path: Path) -> None:
    data = bytes(os.urandom(400))
    archive = write_zip(tmp_path / "a.zip", {"1.jpg": data, "2.jpg": JPEG})
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(data, data[:-1] + bytes([data[-1] ^ 1])))
    assert reason_of(archive, "1.jpg") == "unreadable_file"
    assert read_image(archive, "2.jpg").data == JPEG


@pytest.mark.parametrize(("field", "value"), [("flags", 1), ("method", 99)])
def test_encrypted_and_unknown_members_are_refused(tmp_path: Path, field: str, value: int) -> None:
    archive = write_zip(tmp_path / "a.zip", {"1.jpg": JPEG})
    data = bytearray(archive.read_bytes())
    for signature, offsets in ((b"PK\3\4", {"flags": 6, "method": 8}), (b"PK\1\2", {"flags": 8, "method": 10})):
        struct.pack_into("<H", data, data.index(signature) + offsets[field], value)
    archive.write_bytes(data)
    assert reason_of(archive, "1.jpg") == "unreadable_file"


@pytest.mark.parametrize("cut", [0, 10, 150])
def test_an_archive_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    archive = write_zip(tmp_path / "a.zip", {f"{n}.jpg": JPEG for n in range(9)})
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.zip: no readable zip archive .*; is the download complete"):
        require_images(archive)
    with pytest.raises(DataError, match=r"a\.zip: no readable zip archive"):
        open_file(archive / "rows.json")


def test_a_missing_member_of_the_recipe_is_named(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"1.json": b"[]"})
    with pytest.raises(DataError, match=r"a\.zip/2\.json: no such file"):
        open_file(archive / "2.json")
