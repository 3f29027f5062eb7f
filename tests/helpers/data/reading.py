"""What the tests of the readers share: small files to read, and all that a reader yields."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat

JPEG = b"\xff\xd8 not decoded here"


def read_all(source: Source) -> list[Sample | Skipped]:
    return [item for shard in source.shards() for item in source.read(shard)]


def kept(items: list[Sample | Skipped]) -> list[Sample]:
    return [item for item in items if isinstance(item, Sample)]


def reasons(items: list[Sample | Skipped]) -> Counter[str]:
    return Counter(item.reason for item in items if isinstance(item, Skipped))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def learned(source: Source) -> list[str]:
    return [sample.text for sample in kept(read_all(source))]


def details(source: Source) -> list[str]:
    return [f"{item.key}: {item.detail}" for item in read_all(source) if isinstance(item, Skipped)]


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pair(key: str, text: str = "") -> dict[str, bytes]:
    return {f"{key}.jpg": JPEG, f"{key}.txt": (text or key).encode()}


def qwen(folder: Path, *turns: str, **fields: Any) -> list[Sample | Skipped]:
    """What Qwen-VL's reader yields of one dialogue."""
    roles = ["user", "assistant"] * len(turns)
    record = {"conversations": [{"from": role, "value": text} for role, text in zip(roles, turns, strict=False)]}
    return read_all(QwenVLChat("q", write_json(folder / "q.json", [{**record, **fields}]), folder))
