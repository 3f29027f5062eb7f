"""Files are whole for whoever reads them, and on the disk before they have their names."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_vl.files import HashedWriter, draft_of, move, sha256_of_next, whole_file, whole_folder, write_whole


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_the_draft_is_not(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "b", tmp_path / "b.partial"):
        (tmp_path / "b.partial" / "c").write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_is_durable_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".")[0]))
        sync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append(("rename", new.name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "quick", "x")
    assert done == [("rename", "quick")]
    write_whole(tmp_path / "a", "x", durable=True)
    assert done[1:] == [("sync", "a"), ("rename", "a")]
    with whole_folder(tmp_path / "b", draft := draft_of(tmp_path / "b"), durable=True):
        (draft / "c").write_text("x")
    assert done[3:] == [("sync", "c"), ("sync", "b"), ("rename", "b"), ("sync", tmp_path.name)]
    move((tmp_path / "a", tmp_path / "d"), (tmp_path / "b", tmp_path / "e"))
    assert done[7:] == [("rename", "d"), ("rename", "e"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("size", [0, 10, 2**16, 2**17 + 1])
def test_what_is_written_is_hashed(size: int) -> None:
    data = os.urandom(size)
    expected = hashlib.sha256(b"first" + data).hexdigest()
    with ThreadPoolExecutor(1) as thread:
        for hasher in (None, thread):
            writer = HashedWriter(file := io.BytesIO(), hasher)
            assert writer.write(b"first") == 5 and writer.write(memoryview(data)) == size
            assert (writer.size, writer.sha256, file.getvalue()) == (5 + size, expected, b"first" + data)
    file = io.BytesIO(b"first" + data + b"more")
    assert sha256_of_next(file, 5 + size) == expected and file.read() == b"more"
