"""Render a data set as one self-contained HTML page: its figures, and some of its rows as they are trained on.

Each picture is in the page once. Boxes are vectors laid over the pictures, so that they stay sharp on a thumbnail and
can be matched with the text. The only script filters existing content. The page's content policy names that script by
its hash and forbids every fetch. So nothing from the data could run or load even if the escaping failed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from markupsafe import Markup

from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.inspector.choice import RowChoice, choose_rows
from megatron_vl.inspector.opening import Vocabulary
from megatron_vl.inspector.overview import Overview, read_overview
from megatron_vl.inspector.row_view import RowReader, RowView
from megatron_vl.inspector.text import printable
from megatron_vl.inspector.thumbnails import Thumbnail, make_thumbnails
from megatron_vl.report.figures import histogram_figure
from megatron_vl.report.html_pages import page_environment

_BINS = 28
_FILL_STEP = 5
"""The histogram of fill begins at a multiple of so many percent."""


@dataclass(frozen=True)
class DataPage:
    """Everything that the page shows."""

    name: str
    overview: Overview
    figures: dict[str, str]
    """Title and <svg> element of each histogram."""
    chosen: str
    """How the rows were chosen."""
    rows: tuple[RowView, ...]
    thumbnails: dict[int, Thumbnail]

    @property
    def sources(self) -> list[str]:
        """Sources of the rows that are shown."""
        return sorted({segment.source for row in self.rows for segment in row.segments})

    @property
    def tasks(self) -> list[str]:
        """Tasks of the rows that are shown."""
        return sorted({segment.task for row in self.rows for segment in row.segments})

    @property
    def problems(self) -> list[tuple[int, str]]:
        """Problems of the rows that are shown, each with its row's index."""
        return [(row.index, problem) for row in self.rows for problem in row.problems]


def read_page(store: RowStore, vocabulary: Vocabulary, choice: RowChoice, *, max_image_side: int = 384) -> DataPage:
    """Gather the figures of a data set and the chosen rows.

    Raises:
        ConfigError: for a choice that the data set does not allow.
        DataError: for a damaged row.
    """
    manifest, overview = store.manifest, read_overview(store)
    reader = RowReader(vocabulary, manifest.num_queries, manifest.seq_length)
    rows = tuple(reader.view(index, store.row(index), store.keys(index)) for index in choose_rows(store, choice))
    pictures = [picture for row in rows for picture in row.pictures]
    image_ids = {picture.image_id for picture in pictures if picture.image_id is not None}
    thumbnails = make_thumbnails(store, image_ids, max_image_side)
    return DataPage(
        name=Path(store.prefix).name,
        overview=overview,
        figures=_figures(overview),
        chosen=choice.described,
        rows=tuple(_with_unreadable(row, thumbnails) for row in rows),
        thumbnails=thumbnails,
    )


def _with_unreadable(row: RowView, thumbnails: Mapping[int, Thumbnail]) -> RowView:
    """Return the row with its unreadable images added to its problems."""
    image_ids = {picture.image_id for picture in row.pictures if picture.image_id is not None}
    number = sum(bool(thumbnails[image_id].problem) for image_id in image_ids)
    problems = [f"{number} unreadable image{'s' if number > 1 else ''}"] if number else []
    return replace(row, problems=(*row.problems, *problems))


def render_page(page: DataPage) -> str:
    """Return the page as HTML."""
    environment = page_environment("megatron_vl.inspector")
    environment.filters["printable"] = printable
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "inspector.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    template = environment.get_template("inspector.html.j2")
    return template.render(page=page, manifest=page.overview.manifest, script=Markup(script), script_hash=digest)


def _figures(overview: Overview) -> dict[str, str]:
    images = overview.manifest.images_per_row
    longest = int(overview.segment_lengths.max(initial=1))
    width = -(-longest // _BINS)
    lowest = _FILL_STEP * int(100 * overview.fills.min(initial=1.0) / _FILL_STEP)
    lowest = min(lowest, 100 - _FILL_STEP)
    lengths, length_edges = np.histogram(overview.segment_lengths, bins=np.arange(0, longest + width + 1, width))
    fills, fill_edges = np.histogram(100 * overview.fills, bins=_BINS, range=(lowest, 100))
    return {
        "Length of the segments": histogram_figure(
            length_edges.tolist(), lengths.tolist(), label="tokens", unit="segments"
        ),
        "Fill of the rows": histogram_figure(fill_edges.tolist(), fills.tolist(), label="% of a row is not padding"),
        "Images in the rows": histogram_figure(
            [count - 0.5 for count in range(len(images) + 1)], images, label="images"
        ),
    }
