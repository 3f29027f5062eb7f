"""Raw data at addresses: in a store of this process, and in one that fails when it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_vl.data.remote import address, store


@contextmanager
def in_memory(folder: Path, name: str) -> Iterator[str]:
    """The address of a copy of all files of a folder in fsspec's store of this process; removed afterwards."""
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    try:
        yield f"memory://{name}"
    finally:
        memory.rm(f"/{name}", recursive=True)


class FailingStore(MemoryFileSystem):
    """The store of this process; each request for bytes takes the first of ``failures``, and raises it."""

    cachable = False

    def __init__(self, *failures: Exception) -> None:
        super().__init__()
        self.failures = list(failures)
        self.num_requests = 0

    def fail(self) -> None:
        self.num_requests += 1
        if self.failures:
            raise self.failures.pop(0)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return FailingFile(self, super().open(path, mode, **options))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        self.fail()
        return bytes(self.store[self._strip_protocol(path)].getvalue()[start:end])


class FailingFile:
    def __init__(self, store: FailingStore, file: Any) -> None:
        self._store, self._file = store, file

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def read(self, size: int) -> Any:
        self._store.fail()
        return self._file.read(size)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0, 0.0))


def use(failing: FailingStore, monkeypatch: pytest.MonkeyPatch) -> FailingStore:
    monkeypatch.setattr(address, "open_store", lambda protocol: failing)
    return failing
