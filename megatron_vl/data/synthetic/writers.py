"""Writers of the published file formats: img2dataset's tars, VQAv2's JSON, MDETR's JSON, JSON Lines."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Json = dict[str, Any]
ANNOTATORS = 10


@dataclass(frozen=True)
class Picture:
    """One record of a tar."""

    image: bytes
    """Image as JPEG."""
    caption: str
    width: int
    height: int
    url: str
    original: tuple[int, int] | None = None
    """Width and height before the image was resized, if it was."""
    extra: Json | None = None
    """Further fields of its json."""


class TarShard:
    """One tar of img2dataset's webdataset output, with its ``_stats.json``, as a context manager."""

    def __init__(self, folder: Path, index: int, samples_per_shard: int) -> None:
        self._folder = folder
        self._index = index
        self._digits = max(1, math.ceil(math.log10(samples_per_shard)))
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(folder / f"{index:05d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if error is None:
            stats = {
                "count": self._count,
                "successes": self._count,
                "failed_to_download": 0,
                "failed_to_resize": 0,
                "status_dict": {"success": self._count},
            }
            write_json(self._folder / f"{self._index:05d}_stats.json", stats)

    def add(self, picture: Picture) -> None:
        """Append a record: .jpg, .json and .txt under the next key."""
        key = f"{self._index:05d}{self._count:0{self._digits}d}"
        self._count += 1
        width, height = picture.original or (picture.width, picture.height)
        meta = {
            **(picture.extra or {}),
            "caption": picture.caption,
            "url": picture.url,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": picture.width,
            "height": picture.height,
            "original_width": width,
            "original_height": height,
            "exif": "{}",
            "sha256": hashlib.sha256(picture.image).hexdigest(),
        }
        self._member(f"{key}.jpg", picture.image)
        self._member(f"{key}.json", json.dumps(meta, indent=4).encode())
        self._member(f"{key}.txt", picture.caption.encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in UTF-8 without escapes."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_json_lines(path: Path, records: Iterable[Json]) -> None:
    """Write a JSON Lines file in UTF-8 without escapes."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_vqa(folder: Path, records: Sequence[Json], subtype: str) -> None:
    """Write both files of VQAv2 from records with image_id, question_id, question, answer and kind."""
    header = {
        "info": {"description": "synthetic scenes", "version": "1.0"},
        "license": {"name": "public domain"},
        "task_type": "Open-Ended",
        "data_type": "synthetic",
        "data_subtype": subtype,
    }
    questions = [{name: record[name] for name in ("image_id", "question", "question_id")} for record in records]
    write_json(folder / "questions.json", {**header, "questions": questions})
    write_json(folder / "annotations.json", {**header, "annotations": [_annotation(record) for record in records]})


def _annotation(record: Json) -> Json:
    answer = record["answer"]
    return {
        "question_type": record["kind"],
        "multiple_choice_answer": answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, ANNOTATORS + 1)
        ],
        "image_id": record["image_id"],
        "answer_type": {"yes": "yes/no", "no": "yes/no"}.get(answer, "number" if answer.isdigit() else "other"),
        "question_id": record["question_id"],
    }


def write_refexp(folder: Path, records: Sequence[Json]) -> None:
    """Write ``refexp.json`` from records with file_name, width, height, image_id, expression and corners (pixels)."""
    images, annotations = [], []
    for index, record in enumerate(records):
        x1, y1, x2, y2 = record["corners"]
        images.append(
            {
                "file_name": record["file_name"],
                "height": record["height"],
                "width": record["width"],
                "id": index,
                "original_id": record["image_id"],
                "caption": record["expression"],
                "dataset_name": "synthetic",
                "tokens_negative": [[0, len(record["expression"])]],
            }
        )
        annotations.append(
            {
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "image_id": index,
                "category_id": 1,
                "id": index,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "original_id": index,
                "tokens_positive": [[0, len(record["expression"])]],
            }
        )
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write_json(folder / "refexp.json", {**document, "categories": [{"id": 1, "name": "object"}]})
