"""The interface of the readers of data sets."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.images.stored import settle_image
from megatron_vl.data.sample import ImageRef, Sample


@dataclass(frozen=True)
class Source(ABC):
    """Options and methods of every reader."""

    name: str
    """Name of the source in the recipe; becomes ``Sample.source``."""
    exif_orientation: Literal["ignore", "apply"] = dataclasses.field(default="ignore", kw_only=True)
    """Use the pixels as they are stored, or apply their EXIF orientation."""
    scaled_images: bool = dataclasses.field(default=False, kw_only=True)
    """Images were scaled as a whole after annotation, so only the proportions of declared sizes are compared."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return the units of work in a fixed order. Raises DataError if files of the source are missing."""

    def files(self) -> list[Path]:
        """Return the files besides the shards from which samples are made.

        Finished work stays valid only while these files are unchanged. By default, these are all options that are
        paths. Images that records name are not included.
        """
        values = [getattr(self, item.name) for item in dataclasses.fields(self)]
        return [value for value in values if isinstance(value, Path)]

    def score_fields(self) -> tuple[str, ...]:
        """Return the record fields that may hold the score of a sample; empty if the format has no scores."""
        return ()

    def settle(self, image: ImageRef) -> ImageRef:
        """Return the image as it is stored; see ``settle_image``."""
        return settle_image(image, exif_orientation=self.exif_orientation, scaled_images=self.scaled_images)

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        """Yield one item for each record of ``shard``, in the order of the file."""
