"""A checkpoint is complete or invisible, whenever the process that writes it dies."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vl.checkpoint import store
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.files import draft_of
from tests.helpers.listening import heard


class Killed(BaseException):
    """The process ends here."""


def _write(staging: Path, text: str) -> list[store.FileRecord]:
    for name in ("__0_0.distcp", "config.yaml"):
        (staging / name).write_text(f"{name}: {text}")
    return [store.record_file(path) for path in sorted(staging.iterdir())]


def _save(root: Path, step: int, text: str = "first") -> Path:
    staging = store.open_staging(root, step)
    return store.commit(staging, root, step=step, files=_write(staging, text), facts={"layout": {"tensor": 1}})


def _content(checkpoint: Path) -> str:
    store.verify(checkpoint)
    return (checkpoint / "config.yaml").read_text().removeprefix("config.yaml: ")


def _hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def test_a_committed_checkpoint_is_found(tmp_path: Path) -> None:
    first, second = _save(tmp_path, 5), _save(tmp_path, 100)
    assert second == tmp_path / "iter_0000100" == store.resolve(tmp_path) == store.resolve(second)
    assert store.resolve(first) == first == store.directory_of(tmp_path, 5)
    assert store.steps_in(tmp_path) == [5, 100]
    assert (tmp_path / store.TRACKER).read_text() == "100\n"
    assert _hidden(tmp_path) == []
    manifest = store.read_manifest(second)
    assert (manifest["step"], manifest["layout"]) == (100, {"tensor": 1})
    assert set(manifest["files"]) == {"__0_0.distcp", "config.yaml"}


def test_what_is_being_written_is_invisible(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    _write(store.open_staging(tmp_path, 6), "half")
    assert store.steps_in(tmp_path) == [5]
    assert store.resolve(tmp_path).name == "iter_0000005"


def test_a_committed_checkpoint_is_never_written_to_again(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="iter_0000005 is already there; save to another directory"):
        store.open_staging(tmp_path, 5)
    assert _content(store.resolve(tmp_path)) == "first"


def test_every_file_is_synchronised_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[str] = []
    plain = os.fsync

    def record(handle: int) -> None:
        synchronised.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        plain(handle)

    monkeypatch.setattr(os, "fsync", record)
    _save(tmp_path, 5)
    staging = next(name for name in synchronised if name.startswith(".staging-"))
    written = ["__0_0.distcp", "config.yaml", store.MANIFEST, staging]
    drafts = {name: name.rsplit(".", 2)[0] for name in synchronised if name.endswith(".draft")}
    assert [drafts.get(name, name) for name in synchronised] == [*written, tmp_path.name, store.TRACKER, tmp_path.name]
    assert list(drafts.values()) == [store.MANIFEST, store.TRACKER]


@contextmanager
def _dying(monkeypatch: pytest.MonkeyPatch, survives: int) -> Iterator[list[str]]:
    """Let the first ``survives`` changes of the file system happen and the process end at the next one."""
    done: list[str] = []

    def mortal(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            if len(done) == survives:
                raise Killed
            done.append(name)
            return change(*args, **kwargs)

        return attempt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal("rename", os.replace))
        patch.setattr(Path, "mkdir", mortal("mkdir", Path.mkdir))
        patch.setattr(Path, "write_text", mortal("write", Path.write_text))
        patch.setattr(Path, "write_bytes", mortal("write", Path.write_bytes))
        patch.setattr(os, "fsync", mortal("sync", os.fsync))
        patch.setattr(shutil, "rmtree", mortal("remove", shutil.rmtree))
        yield done


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for survives in range(100):
        root = tmp_path / str(survives)
        _save(root, 5)
        finished = False
        with _dying(monkeypatch, survives) as done:
            try:
                _save(root, 6, "second")
                finished = True
            except Killed:
                pass
        seen.append(_content(store.resolve(root)))
        assert store.steps_in(root) in ([5], [5, 6])
        third = _save(root, 7, "third")
        assert _hidden(root) == [], "the next save clears away what was left"
        assert store.resolve(root) == third
        contents = [_content(store.directory_of(root, step)) for step in store.steps_in(root)]
        assert contents in (["first", "third"], ["first", "second", "third"])
        if finished:
            break
    assert finished and done.count("rename") >= 2
    assert seen == sorted(seen), "first the old one, then the new one"
    assert set(seen) == {"first", "second"}


def test_a_killed_writer_of_the_tracker_leaves_nothing_for_long(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    draft_of(tmp_path / store.TRACKER).write_text("6")
    mine = draft_of(tmp_path / "notes.txt")
    mine.write_text("mine")
    _save(tmp_path, 6)
    assert list(tmp_path.glob("*.draft")) == [mine]


@pytest.mark.parametrize("text", ["", "7\n", "five", "-1", "\x00\ufffd", "release"], ids=repr)
def test_a_wrong_tracker_is_ignored(tmp_path: Path, text: str) -> None:
    _save(tmp_path, 5)
    _save(tmp_path, 6)
    (tmp_path / store.TRACKER).write_text(text)
    assert store.resolve(tmp_path).name == "iter_0000006"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5\n", "TRACKER NOT FOLLOWED: .*names step 5, but the newest checkpoint is that of step 6"),
        ("7\n", "LOST CHECKPOINT: .*names step 7, which is not there; newest is step 6"),
        ("6\n", None),
        (None, None),
    ],
)
def test_a_tracker_is_not_followed_and_told_of(tmp_path: Path, text: str | None, told: str | None) -> None:
    """A run that was killed between its save and the tracker has its newest checkpoint all the same."""
    _save(tmp_path, 5)
    newest = _save(tmp_path, 6)
    (tmp_path / store.TRACKER).unlink()
    if text:
        (tmp_path / store.TRACKER).write_text(text)
    assert store.resolve(tmp_path) == newest
    with heard() as warnings:
        store.warn_of_tracker(tmp_path, 6)
    assert len(warnings) == bool(told) and all(re.search(str(told), warning) for warning in warnings)


def test_a_newest_one_without_manifest_is_not_passed_over(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    newest = _save(tmp_path, 6)
    (newest / store.MANIFEST).unlink()
    assert store.resolve(tmp_path) == store.resolve(newest) == newest
    with pytest.raises(DamagedCheckpointError, match="iter_0000006/manifest.json: missing"):
        store.verify(store.resolve(tmp_path))


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000009").mkdir()
    (tmp_path / "iter_0000009" / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"holds no committed checkpoint \(iter_\*/manifest.json\)"):
        store.resolve(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist; give the directory that --save wrote to"):
        store.resolve(tmp_path / "nowhere")


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, 5)
    shard = checkpoint / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpointError, match=f"__0_0.distcp: {len(content) - 1} bytes, but {len(content)}"):
        store.verify(checkpoint)
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedCheckpointError, match="__0_0.distcp: SHA-256 .* the file was changed"):
        store.verify(checkpoint)
    shard.unlink()
    with pytest.raises(DamagedCheckpointError, match="__0_0.distcp: missing"):
        store.verify(checkpoint)


def test_each_file_is_in_one_share_and_shares_are_of_a_size() -> None:
    files = [store.FileRecord(f"__{number}_0.distcp", 100 + number, "") for number in range(16)]
    files += [store.FileRecord("rng.pt", 3, "")]
    for world_size in (1, 3, 8, 40):
        shares = store.share_out(files, world_size)
        assert sorted(file.name for share in shares for file in share) == sorted(file.name for file in files)
        load = [sum(file.size for file in share) for share in shares]
        assert max(load) - min(load) <= 115


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that is away for a minute is no reason to rename a checkpoint and go back; a broken disk is."""
    checkpoint = _save(tmp_path, 5)

    def fail(number: int) -> Callable[[Path], str]:
        def sha256(path: Path) -> str:
            raise OSError(number, os.strerror(number), str(path))

        return sha256

    for number, kind in ((errno.ESTALE, CheckpointError), (errno.EIO, DamagedCheckpointError)):
        monkeypatch.setattr(store, "sha256_of_file", fail(number))
        with pytest.raises(kind) as caught:
            store.verify(checkpoint)
        assert type(caught.value) is kind


def test_a_checkpoint_under_the_name_of_another_step_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 5).rename(tmp_path / "iter_0000007")
    with pytest.raises(DamagedCheckpointError, match="is of step 5, under the name of another one"):
        store.verify(tmp_path / "iter_0000007")
    (tmp_path / "iter_0000007").rename(tmp_path / "best")
    store.verify(tmp_path / "best")


def test_a_manifest_written_before_there_were_digests_is_read(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, 5)
    manifest = store.read_manifest(checkpoint)
    del manifest["digest"]
    (checkpoint / store.MANIFEST).write_text(json.dumps(manifest))
    store.verify(checkpoint)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_manifest_is_named_or_harmless(tmp_path: Path, place: int, bit: int) -> None:
    checkpoint = tmp_path / "iter_0000005"
    if not checkpoint.exists():
        _save(tmp_path, 5)
        shutil.copy(checkpoint / store.MANIFEST, tmp_path)
    path = checkpoint / store.MANIFEST
    shutil.copy(tmp_path / store.MANIFEST, path)
    content = bytearray(path.read_bytes())
    before = json.loads(content)
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        store.verify(checkpoint)
    except DamagedCheckpointError as error:
        assert str(checkpoint) in str(error)
    else:
        read = store.read_manifest(checkpoint)
        assert read == before or "digest" not in read
        assert read["files"] == before["files"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2}', "format_version 2, expected 3: written by another version"),
        ("[]", "is not what was written"),
        ('{"format_version": 3, "files": {"a": 3}}', "lists no files with their sizes and hashes"),
        ("{", "cannot be read"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    checkpoint = _save(tmp_path, 5)
    (checkpoint / store.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        store.read_manifest(checkpoint)


@pytest.mark.parametrize(("keep", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (1, [4]), (9, [1, 2, 3, 4])])
def test_retention_keeps_the_newest(tmp_path: Path, keep: int | None, kept: list[int]) -> None:
    for step in range(1, 5):
        _save(tmp_path, step)
    store.retain(tmp_path, keep)
    assert store.steps_in(tmp_path) == kept
    assert _hidden(tmp_path) == []
