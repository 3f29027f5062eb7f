"""Boxes lie where their record says: its size is that of the image, and all that decodes turns the image alike."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.images.decode import check_image, decode_image
from megatron_vl.data.images.stored import upright
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.sample import ImageRef
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.errors import SkipSample
from megatron_vl.inspector.thumbnails import make_thumbnails
from tests.helpers.data import published_grounding
from tests.helpers.data.learned import outcomes, recipe_of
from tests.helpers.data.reading import kept, read_all, write_json, write_tar

WIDTH, HEIGHT = 64, 48


def encoded(kind: str = "JPEG", orientation: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A dark image with a bright top left quarter."""
    image = Image.new("RGB", size, (20, 20, 20))
    image.paste((250, 240, 30), (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def write_refexp(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    image = {"id": 1, "file_name": "a.jpg", "caption": "it", "width": size[0], "height": size[1]}
    write_json(folder / "r.json", {"images": [image], "annotations": [{"image_id": 1, "bbox": [4, 4, 20, 20]}]})
    return {"type_": "refexp", "path": "r.json", "image_root": "."}


def write_regions(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    region = {"x": 4, "y": 4, "width": 20, "height": 20, "phrase": "it"}
    write_json(folder / "regions.json", [{"id": 1, "regions": [region, {**region, "phrase": "that"}]}])
    image = {"image_id": 1, "url": "https://x.ex/VG_100K/a.jpg", "width": size[0], "height": size[1], "coco_id": None}
    write_json(folder / "images.json", [image])
    (folder / "VG_100K").mkdir(exist_ok=True)
    shutil.copy(folder / "a.jpg", folder / "VG_100K")
    return {"type_": "visual_genome", "regions": "regions.json", "images": "images.json", "image_root": "."}


def write_refcoco(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    for name in ("refer", "train2014"):
        shutil.rmtree(folder / name, ignore_errors=True)
    published_grounding.write_refcoco(folder)
    path = folder / "refer/data/refcoco/instances.json"
    document = json.loads(path.read_text())
    for image in document["images"]:
        image.update(width=size[0], height=size[1])
    for annotation in document["annotations"]:
        annotation["bbox"] = [4, 4, 20, 20]
    write_json(path, document)
    shutil.copy(folder / "a.jpg", folder / "train2014/COCO_train2014_000000581857.jpg")
    return {"type_": "refcoco", "path": "refer/data/refcoco", "image_root": "train2014"}


def write_ocr(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    line = {"text": "word", "quad": [[4, 4], [24, 4], [24, 12], [4, 12]]}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "size": size, "lines": [line]}) + "\n")
    return {"type_": "ocr", "path": "metadata.jsonl"}


def write_grit(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    fields = {"caption": "it", "ref_exps": [[0, 2, 0.1, 0.1, 0.5, 0.5, 0.9]], "width": size[0], "height": size[1]}
    write_tar(folder / "0.tar", [("0.jpg", (folder / "a.jpg").read_bytes()), ("0.json", json.dumps(fields).encode())])
    return {"type_": "grounded_caption", "path": "0.tar"}


def write_llava(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "[0.1, 0.2, 0.5, 0.6]"}]
    write_json(folder / "l.json", [{"image": "a.jpg", "conversations": turns, "width": size[0], "height": size[1]}])
    return {"type_": "llava", "path": "l.json", "image_root": "."}


def write_qwen(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    asked = {"from": "user", "value": "Picture 1: <img>a.jpg</img>\nWhere?"}
    turns = [asked, {"from": "assistant", "value": "<box>(1,2),(3,4)</box>"}]
    write_json(folder / "q.json", [{"conversations": turns, "width": [size[0]], "height": [size[1]]}])
    return {"type_": "qwen_vl_chat", "path": "q.json", "image_root": "."}


FORMATS: list[Callable[[Path, tuple[int, int]], dict[str, Any]]] = [
    write_refexp, write_regions, write_refcoco, write_ocr, write_grit, write_llava, write_qwen,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS)
def test_a_record_of_another_size_than_its_image_is_left_out(tmp_path: Path, write: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(orientation=6))
    assert outcomes(tmp_path, **write(tmp_path, (WIDTH, HEIGHT)))["size_mismatch"] == 0
    options = write(tmp_path, (HEIGHT, WIDTH))
    found = outcomes(tmp_path, **options)
    assert found["size_mismatch"] > 0 == found["kept"]
    turned = outcomes(tmp_path, **options, exif_orientation="apply")
    assert turned["kept"] > 0 == turned["size_mismatch"]


@pytest.mark.parametrize("write", FORMATS)
def test_images_that_were_scaled_as_a_whole_fit_if_that_is_said(tmp_path: Path, write: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(size=(43, 32)))
    options = write(tmp_path, (WIDTH, HEIGHT))
    fractions = write is write_grit
    assert (outcomes(tmp_path, **options)["size_mismatch"] == 0) == fractions
    assert outcomes(tmp_path, **options, scaled_images=True)["size_mismatch"] == 0
    (tmp_path / "a.jpg").write_bytes(encoded(size=(43, 43)))
    options = write(tmp_path, (WIDTH, HEIGHT))
    assert outcomes(tmp_path, **options, scaled_images=True)["kept"] == 0


def test_the_message_says_both_sizes_and_the_orientation(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(orientation=8))
    recipe = recipe_of(tmp_path, **write_refexp(tmp_path, (HEIGHT, WIDTH)))
    source = recipe.sources[0].source
    (sample,) = kept(read_all(source))
    with pytest.raises(SkipSample, match="record says 48 x 64, the image is 64 x 48; its EXIF orientation is 8"):
        source.settle(sample.images[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_what_is_turned_looks_as_viewers_show_it(kind: str, orientation: int) -> None:
    data = encoded(kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=int)
    turned = upright(data)
    assert (turned == data) == (kind == "TIFF" or orientation not in range(2, 9))
    found = np.asarray(decode_image(turned), dtype=int)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 1
    assert check_image(turned) == expected.shape[1::-1]
    assert upright(turned) == turned, "no second turn"


def test_damaged_exif_turns_nothing() -> None:
    data = bytearray(encoded(orientation=6))
    at = data.index(b"Exif") + 6
    for first in range(at, at + 20):
        damaged = bytes(data[:first]) + bytes([data[first] ^ 0xFF]) + bytes(data[first + 1 :])
        assert check_image(upright(damaged)) in ((WIDTH, HEIGHT), (HEIGHT, WIDTH))


@pytest.mark.parametrize("option", ["ignore", "apply"])
def test_training_and_inspector_see_the_same_image(tmp_path: Path, option: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(orientation=6))
    size = (WIDTH, HEIGHT) if option == "ignore" else (HEIGHT, WIDTH)
    recipe = recipe_of(tmp_path, **write_refexp(tmp_path, size), exif_orientation=option)
    prepare(recipe, tmp_path / "set", progress=False)
    store = RowStore(tmp_path / "set")
    decoded = decode_image(store.image(0))
    shown = make_thumbnails(store, [0], 64)[0]
    store.close()
    assert decoded.size == (shown.width, shown.height) == size
    bright = (0, 0) if option == "ignore" else (size[0] - 1, 0)
    assert decoded.getpixel(bright)[0] > 200  # type: ignore[index]


def test_boxes_of_llava_are_those_of_the_turned_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(orientation=6, size=(200, 100)))
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "[0.25, 0.0, 0.75, 1.0]"}]
    path = write_json(tmp_path / "l.json", [{"image": "a.jpg", "conversations": turns}])
    texts = {}
    for option in ("ignore", "apply"):
        (sample,) = kept(read_all(LLaVA("l", path, tmp_path, exif_orientation=option)))  # type: ignore[arg-type]
        texts[option] = sample.turns[-1].text
    assert texts == {"ignore": "<box>(250,0),(750,999)</box>", "apply": "<box>(0,0),(999,999)</box>"}


def test_an_image_without_a_declared_size_is_taken_as_it_is(tmp_path: Path) -> None:
    image = ImageRef("a", encoded(orientation=6))
    source = recipe_of(tmp_path, **write_refexp(tmp_path, (1, 1))).sources[0].source
    assert source.settle(image) == image


@pytest.mark.parametrize("option", ["ignore", "apply"])
def test_an_image_of_a_benchmark_is_known_turned_or_not(tmp_path: Path, option: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(orientation=6))
    (tmp_path / "b.jpg").write_bytes(encoded(size=(WIDTH, WIDTH)))
    (tmp_path / "benchmark").mkdir()
    shutil.copy(tmp_path / "a.jpg", tmp_path / "benchmark")
    pairs = [{"image": name, "caption": "it"} for name in ("a.jpg", "b.jpg")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    filters = {"benchmark_images": "benchmark"}
    recipe = recipe_of(tmp_path, "pairs", path="p.jsonl", image_root=".", filters=filters, exif_orientation=option)
    manifest = prepare(recipe, tmp_path / "set", progress=False)
    assert [(skip.reason, skip.count) for skip in manifest.skips] == [("benchmark_image", 1)]
