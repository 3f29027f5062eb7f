"""Caption sets as their downloads look: the names of files, keys and types of the real ones, and their quirks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers.data.reading import write_json, write_tar


def picture(shade: int, form: str = "JPEG", size: tuple[int, int] = (32, 24)) -> bytes:
    """An image that decodes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 255 - shade % 256, 40)).save(buffer, form)
    return buffer.getvalue()


@dataclass(frozen=True)
class Download:
    """What img2dataset makes of one row of a list of addresses."""

    key: int
    caption: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """``save_additional_columns``."""
    image: bytes | None = None
    """By default a picture of the shade ``key``."""
    failed: bool = False
    without: tuple[str, ...] = ()
    """Suffixes of members that are missing."""

    @property
    def data(self) -> bytes:
        return picture(self.key) if self.image is None else self.image

    def metadata(self, digits: int) -> dict[str, Any]:
        size = dict.fromkeys(("width", "height", "original_width", "original_height"))
        if not self.failed:
            size = {"width": 32, "height": 24, "original_width": 640, "original_height": 480}
        return {
            **self.columns,
            "caption": self.caption,
            "url": f"http://shop.ex/{self.key}.jpg",
            "key": f"{self.key:0{digits}d}",
            "status": "failed_to_download" if self.failed else "success",
            "error_message": "HTTP Error 404: Not Found" if self.failed else None,
            **size,
            "exif": None if self.failed else "{}",
            "sha256": None if self.failed else f"{self.key:064x}",
        }


def write_webdataset(folder: Path, downloads: list[Download], shard: str = "00000", digits: int = 9) -> Path:
    """``output_format=webdataset``: members in the order of completion, failures in the parquet alone."""
    folder.mkdir(parents=True, exist_ok=True)
    members = []
    for item in downloads:
        if not item.failed:
            files = _files(item, digits)
            members += [(f"{item.key:0{digits}d}.{suffix}", data) for suffix, data in files.items()]
    write_tar(folder / f"{shard}.tar", members)
    _write_parquet(folder / f"{shard}.parquet", [item.metadata(digits) for item in downloads])
    _write_stats(folder / f"{shard}_stats.json", downloads)
    return folder


def write_files(folder: Path, downloads: list[Download], shard: str = "00000", digits: int = 9) -> Path:
    """``output_format=files``."""
    (folder / shard).mkdir(parents=True)
    for item in downloads:
        if not item.failed:
            for suffix, data in _files(item, digits).items():
                (folder / shard / f"{item.key:0{digits}d}.{suffix}").write_bytes(data)
    _write_parquet(folder / f"{shard}.parquet", [item.metadata(digits) for item in downloads])
    _write_stats(folder / f"{shard}_stats.json", downloads)
    return folder


def write_parquet(folder: Path, downloads: list[Download], shard: str = "00000", digits: int = 9) -> Path:
    """``output_format=parquet``: failures are rows without an image; row groups of a few rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in downloads:
        files = {} if item.failed else _files(item, digits)
        row = item.metadata(digits)
        rows.append({**row, "jpg": files.get("jpg"), "txt": files["txt"].decode() if "txt" in files else None})
    _write_parquet(folder / f"{shard}.parquet", rows)
    _write_stats(folder / f"{shard}_stats.json", downloads)
    return folder


def _files(item: Download, digits: int) -> dict[str, bytes]:
    """jpg, json, txt: an absent caption is an empty txt."""
    files = {
        "jpg": item.data,
        "json": json.dumps(item.metadata(digits), indent=4).encode(),
        "txt": (item.caption or "").encode(),
    }
    return {suffix: data for suffix, data in files.items() if suffix not in item.without}


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def _write_stats(path: Path, downloads: list[Download]) -> None:
    failed = sum(item.failed for item in downloads)
    status = {"success": len(downloads) - failed, "HTTP Error 404: Not Found": failed}
    values = {"count": len(downloads), "successes": len(downloads) - failed, "failed_to_download": failed}
    write_json(path, {**values, "failed_to_resize": 0, "duration": 1.5, "status_dict": status})


def laion_en() -> list[Download]:
    """Gaps, no order, an absent caption, a missing txt, a missing json, PNG bytes under .jpg, a cut JPEG."""
    more = {"NSFW": "UNLIKELY", "LICENSE": "?", "hash": -4817263549012}
    return [
        Download(7, "Red kettle on gas stove", {**more, "similarity": 0.3312}),
        Download(3, "Vintage brass lamp &amp; shade", {**more, "similarity": 0.31274}, without=("txt",)),
        Download(4, None, {**more, "similarity": 0.29}),
        Download(5, "gone", {**more, "similarity": 0.3}, failed=True),
        Download(9, "A PNG under .jpg", {**more, "similarity": None}, image=picture(9, "PNG")),
        Download(8, "no metadata", {**more, "similarity": 0.35}, without=("json",)),
        Download(12, "cut", {**more, "similarity": 0.4}, image=picture(12)[:200]),
    ]


def laion_zh() -> list[Download]:
    return [Download(1, "不锈钢保温杯 500ml 厂家直销", {"LANGUAGE": "zh", "similarity": 0.2871})]


def laion_coco() -> list[Download]:
    """The txt is the alt text, the caption to learn is top_caption."""
    captions = ["a brown dog lying on a grey sofa", "dog on couch"]
    more = {"similarity": 0.29, "pwatermark": 0.11, "punsafe": 0.0003}
    return [
        Download(
            0,
            "IMG_2231 copy",
            {"top_caption": captions[0], "all_captions": captions, "all_similarities": [0.331, 0.297], **more},
        ),
        Download(1, "alt text", {"top_caption": None, "all_captions": [], "all_similarities": [], **more}),
    ]


def datacomp() -> list[Download]:
    scores = {"clip_b32_similarity_score": 0.2217, "clip_l14_similarity_score": 0.1836}
    boxes = {"face_bboxes": [[0.41, 0.10, 0.58, 0.33]]}
    return [
        Download(0, "Case cover for phone", {"uid": "1e42519d02455c06411394e1950954ab", **boxes}),
        Download(1, "Oak table", {"uid": "2f" * 16, **scores, "face_bboxes": []}),
    ]


def coyo() -> list[Download]:
    scores = {"clip_similarity_vitb32": 0.3021, "clip_similarity_vitl14": 0.2478}
    more = {"image_phash": "bac58374982e0fc7", "num_faces": 0, "nsfw_score_opennsfw2": 0.0004}
    return [Download(0, "Fishing fleet, valentine&amp;#39;s day", {"id": 4896263451343, **scores, **more})]


def write_karpathy(folder: Path) -> Path:
    """dataset_coco.json beside the images of train2014 and val2014; sentences as people left them."""

    def image(imgid: int, split: str, folder_name: str, cocoid: int, raws: list[str]) -> dict[str, Any]:
        ids = [cocoid * 10 + n for n in range(len(raws))]
        sentences = [
            {"tokens": raw.lower().strip(" .\n").split(), "raw": raw, "imgid": imgid, "sentid": sentid}
            for raw, sentid in zip(raws, ids, strict=True)
        ]
        name = f"COCO_{folder_name}_{cocoid:012d}.jpg"
        head = {"filepath": folder_name, "sentids": ids, "filename": name, "imgid": imgid, "split": split}
        return {**head, "sentences": sentences, "cocoid": cocoid}

    images = [
        image(0, "train", "train2014", 57870, ["A restaurant has modern wooden tables. ", "Long table\n", "   "]),
        image(7, "test", "val2014", 391999, ["A man on a moped. ", "Moped rider"]),
        image(9, "restval", "val2014", 522418, ["A woman cuts a large white sheet cake."]),
        image(11, "train", "train2014", 999, ["The photograph is missing", "twice"]),
    ]
    for entry in images[:3]:
        path = folder / entry["filepath"] / entry["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(entry["imgid"]))
    return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
