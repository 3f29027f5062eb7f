"""Rows of a parquet file that holds encoded images, a few rows at a time.

Columns are decoded page by page, without a buffer for a whole row group. So memory does not grow with the size of a
file or of its row groups. A file that is not parquet is one skipped record, like a file that is not a tar. In a damaged
row group, every row is a skipped record. A file without a column of images is a list of addresses. This is an error for
the first file of a folder, and a skipped record for later files.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.data.file_kinds import foreign_form
from megatron_vl.data.formats.shard import Skipped, require_file
from megatron_vl.data.remote.places import for_library
from megatron_vl.errors import DataError

BATCH_ROWS = 64
BUFFER_BYTES = 2**20
IMAGE_STRUCT = frozenset({"bytes", "path"})
"""Fields of an image as Hugging Face's datasets stores it."""


def require_images_in(path: Path, columns: Sequence[str]) -> None:
    """Raise DataError if pyarrow is missing, or if a readable file has no image column named in ``columns``."""
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
    """Yield the rows as dictionaries, each with a ``key`` (the row number if the file has none).

    Raises:
        DataError: pyarrow or the file is missing.
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
    """Return pyarrow's ParquetFile, or ``Skipped`` if the file is not parquet."""
    arrow, parquet = _load_pyarrow()
    try:
        return parquet.ParquetFile(for_library(path), buffer_size=BUFFER_BYTES, pre_buffer=False)
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
    """Yield the rows of a batch. Text that is not UTF-8 is detected only here, and affects only its row."""
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
