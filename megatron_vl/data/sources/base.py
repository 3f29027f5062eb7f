"""What a reader of a data set is."""

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
    """Options that every reader has, and what a reader does."""

    name: str
    """Name of the source in the recipe; becomes ``Sample.source``."""
    exif_orientation: Literal["ignore", "apply"] = dataclasses.field(default="ignore", kw_only=True)
    """Take the pixels as they are stored, or turned as EXIF says."""
    scaled_images: bool = dataclasses.field(default=False, kw_only=True)
    """Images were scaled as a whole after they were annotated: compare the proportions of declared sizes only."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Units of work in a fixed order. Raises DataError if the source's files are missing."""

    def files(self) -> list[Path]:
        """Files beside the shards from which samples are made: finished work counts only as long as they are unchanged.

        By default all options that are paths. Images that records name are not among them.
        """
        values = [getattr(self, item.name) for item in dataclasses.fields(self)]
        return [value for value in values if isinstance(value, Path)]

    def score_fields(self) -> tuple[str, ...]:
        """Fields of a record of which one may hold the score of the sample; none if the format has no scores."""
        return ()

    def settle(self, image: ImageRef) -> ImageRef:
        """The image as it is stored, see ``settle_image``."""
        return settle_image(image, exif_orientation=self.exif_orientation, scaled_images=self.scaled_images)

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        """One item for each record of ``shard``, in the order of the file."""
