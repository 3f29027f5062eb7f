"""Make small copies of a data set's images for a page: decoded under limits, shrunk, encoded anew, each once."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.images.decode import decode_image
from megatron_vl.errors import DataError, SkipSample

_QUALITY = 80
_BLANK = "#c8ccd1"
_BLANK_SIDE = 64


@dataclass(frozen=True)
class Thumbnail:
    """One image of the page."""

    image_id: int
    width: int
    height: int
    """Of the stored image; 0 if it cannot be read."""
    num_bytes: int
    """Of the stored image."""
    uri: str
    """The small copy as a data URI."""
    shown_width: int
    shown_height: int
    problem: str = ""
    """Why the image cannot be shown."""


def make_thumbnails(store: RowStore, image_ids: Iterable[int], max_side: int) -> dict[int, Thumbnail]:
    """Return a thumbnail of each image, no side of it above ``max_side`` pixels, by id."""
    return {image_id: _make_thumbnail(store, image_id, max_side) for image_id in sorted(set(image_ids))}


def _make_thumbnail(store: RowStore, image_id: int, max_side: int) -> Thumbnail:
    data = b""
    try:
        data = store.image(image_id)
        image, problem = decode_image(data), ""
        size = image.size
    except (SkipSample, DataError) as error:
        image, problem, size = Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE), _BLANK), str(error), (0, 0)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(image_id, *size, len(data), uri, *image.size, problem=problem)
