"""Reading ahead, and damaged checkpoints."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megatron_vl.checkpoint.tensor_files import index_archive_part
from megatron_vl.checkpoint.tensors import read_ahead
from megatron_vl.errors import ConversionError


def test_the_next_one_is_read_while_this_one_is_used() -> None:
    started = {name: threading.Event() for name in "abc"}

    def read(name: str) -> str:
        started[name].set()
        return name.upper()

    seen = []
    for name, value in read_ahead("abc", read):
        seen.append((name, value))
        for following in "abc"[len(seen) : len(seen) + 1]:
            assert started[following].wait(10)
        for later in "abc"[len(seen) + 1 :]:
            assert not started[later].is_set(), "two are in memory at most"
    assert seen == [("a", "A"), ("b", "B"), ("c", "C")]
    assert list(read_ahead([], read)) == []


def test_what_cannot_be_read_is_raised_where_it_is_used() -> None:
    def read(name: str) -> str:
        if name == "b":
            raise ConversionError("b is damaged")
        return name

    seen = []
    with pytest.raises(ConversionError, match="b is damaged"):
        for name, _ in read_ahead("abc", read):
            seen.append(name)
    assert seen == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no archive", "x: refused"), (["a list"], "x is a list; expected a tensor")],
)
def test_a_part_that_is_no_tensor(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "data"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ConversionError, match=message):
        index_archive_part(file, 0, file.stat().st_size, name="x")


def test_parts_of_a_file(tmp_path: Path) -> None:
    file, tensors = tmp_path / "data", [torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    places = []
    with file.open("wb") as stream:
        for tensor in tensors:
            start = stream.tell()
            torch.save(tensor, stream)
            places.append((start, stream.tell() - start))
    for tensor, (start, length) in zip(tensors, places, strict=True):
        assert torch.equal(index_archive_part(file, start, length, name="x").read(), tensor)
