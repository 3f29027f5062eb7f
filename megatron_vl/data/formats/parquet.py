"""Rows of a parquet file that holds encoded images, a few at a time.

Columns are decoded page by page (no buffer over a whole row group), so that memory does not grow with the
size of a file or of its row groups. A file that is no parquet is one skipped record, as a tar that is none;
of a damaged row group every row is one. A file without a column of images is a list of addresses: an error if
the first file of a folder is one, a skipped record later on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.data.file_kinds import foreign_form
from megatron_vl.data.formats.shard import Skipped, require_file
from megatron_vl.errors import DataError

BATCH_ROWS = 64
BUFFER_BYTES = 2**20
IMAGE_STRUCT = frozenset({"bytes", "path"})
"""Fields of an image as Hugging Face's datasets stores it."""


def require_images_in(path: Path, columns: Sequence[str]) -> None:
    """Raise DataError if pyarrow is missing, or a readable file has no column of images, named as one of
    ``columns``."""
    file = _open(require_file(path, "a parquet file"))
    if isinstance(file, Skipped):
        return
    with file:
        problem = _no_images(file, columns)
    if problem:
        raise DataError(
            f"{path}: {problem}. A list of addresses has to be downloaded first, for example with img2dataset"
        )


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any] | Skipped]:
    """The rows as dictionaries, each with a ``key`` (its number where the file has none).

    Raises DataError if pyarrow or the file is missing.
    """
    file = _open(require_file(path, "a parquet file"))
    if isinstance(file, Skipped):
        yield file
        return
    with file:
        problem = _no_images(file, columns)
        if problem:
            yield Skipped(path.name, "bad_parquet", f"{path}: {problem}")
            return
        yield from _rows_of_file(file, path)


def _open(path: Path) -> Any:
    """pyarrow's ParquetFile, or ``Skipped`` if it is none."""
    arrow, parquet = _load_pyarrow()
    try:
        return parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        return Skipped(path.name, "bad_parquet", f"{path}: {foreign_form(path, 'a parquet file') or error}")


def _no_images(file: Any, columns: Sequence[str]) -> str:
    schema = file.schema_arrow
    structs = [item.name for item in schema if {child.name for child in _children(item)} == IMAGE_STRUCT]
    if set(schema.names) & set(columns) or structs:
        return ""
    found = ", ".join(schema.names)
    return f"no column of images ({', '.join(columns)}, or Hugging Face's of bytes and path); found {found:.200}"


def _children(item: Any) -> list[Any]:
    return [item.type.field(number) for number in range(item.type.num_fields)]


def _rows_of_file(file: Any, path: Path) -> Iterator[dict[str, Any] | Skipped]:
    arrow, _ = _load_pyarrow()
    first = 0
    for group in range(file.metadata.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        number = first
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                yield from _rows_of(batch, path, number)
                number += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            for lost in range(number, end):
                yield Skipped(f"{path.name}/{lost}", "bad_parquet", f"{path}: row group {group}: {error}")
        first = end


def _rows_of(batch: Any, path: Path, first: int) -> Iterator[dict[str, Any] | Skipped]:
    """The rows of a batch; text that is no UTF-8 comes out only here, and is the fault of its row."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _rows_of(batch.slice(index, 1), path, first + index)
        else:
            yield Skipped(f"{path.name}/{first}", "bad_unicode", f"{error.reason} at byte {error.start}")
        return
    for index, row in enumerate(rows):
        yield {**row, "key": row.get("key") or str(first + index)}


def _load_pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("parquet files need pyarrow: pip install 'megatron_vl[data]' (or pyarrow)") from error
