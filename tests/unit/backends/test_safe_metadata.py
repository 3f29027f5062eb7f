"""Opening a checkpoint runs no code from it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_vl.backends import safe_metadata


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
    monkeypatch.setattr(DefaultLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes)
    safe_metadata.install()


def test_honest_metadata_is_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={})))
    assert FileSystemReader(tmp_path).read_metadata().state_dict_metadata == {}


def test_metadata_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(pickle.UnpicklingError, match="has no place in a checkpoint's metadata"):
        FileSystemReader(tmp_path).read_metadata()
    assert not marker.exists()


def test_byte_items_with_code_are_refused(tmp_path: Path) -> None:
    marker, payload = tmp_path / "marker", io.BytesIO()
    torch.save(_Attack(marker), payload)
    payload.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        DefaultLoadPlanner().load_bytes(object(), payload)  # type: ignore[arg-type]
    assert not marker.exists()


class _Attribute:
    """Pickled as ``getattr(owner, name)``, as Python before 3.11.4 pickles the members of enumerations."""

    def __init__(self, owner: object, name: str) -> None:
        self.pair = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.pair


def test_members_of_enumerations_are_read_as_older_pythons_write_them(tmp_path: Path) -> None:
    member = _Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")
    content = pickle.dumps(Metadata(state_dict_metadata={"x": member}))
    (tmp_path / ".metadata").write_bytes(content)
    found = FileSystemReader(tmp_path).read_metadata().state_dict_metadata["x"]
    assert found is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT


@pytest.mark.parametrize(
    ("owner", "name"), [(_MEM_FORMAT_ENCODING, "__subclasses__"), (Metadata, "__init__"), (torch.Size, "numel")]
)
def test_other_attributes_are_refused(tmp_path: Path, owner: object, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Attribute(owner, name)))
    with pytest.raises(pickle.UnpicklingError, match="has no place in a checkpoint's metadata"):
        FileSystemReader(tmp_path).read_metadata()
