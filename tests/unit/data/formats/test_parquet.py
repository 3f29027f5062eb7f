"""Images in parquet: damaged and foreign files, and memory that does not grow with a row group."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.errors import DataError
from tests.helpers.data.published_captions import Download, picture, write_parquet
from tests.helpers.data.reading import kept, read_all, reasons


def source(folder: Path) -> Img2Dataset:
    return Img2Dataset("set", folder)


def write_addresses(path: Path) -> None:
    row = {"SAMPLE_ID": 2160049015678, "URL": "http://shop.ex/a.jpg", "TEXT": None, "WIDTH": 450.0, "similarity": 0.3}
    pq.write_table(pa.Table.from_pylist([row]), path)


def test_a_list_of_addresses_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_addresses(tmp_path / "part-00000-c000.snappy.parquet")
    with pytest.raises(DataError, match=r"no column of images .*found SAMPLE_ID, URL.*has to be downloaded first"):
        source(tmp_path).shards()


def test_a_stray_list_of_addresses_does_not_end_the_work(tmp_path: Path) -> None:
    write_parquet(tmp_path, [Download(0, "a caption")])
    write_addresses(tmp_path / "metadata.parquet")
    items = read_all(source(tmp_path))
    assert (len(kept(items)), reasons(items)) == (1, {"bad_parquet": 1})


@pytest.mark.parametrize("damage", ["cut", "no parquet", "empty"])
def test_a_file_that_is_no_parquet_is_counted_and_named(tmp_path: Path, damage: str) -> None:
    write_parquet(tmp_path, [Download(n, f"caption {n}") for n in range(4)], shard="00000")
    write_parquet(tmp_path, [Download(n, f"caption {n}") for n in range(4)], shard="00001")
    path = tmp_path / "00000.parquet"
    path.write_bytes({"cut": path.read_bytes()[:-100], "no parquet": b"<html>" * 50, "empty": b""}[damage])
    items = read_all(source(tmp_path))
    assert reasons(items) == {"bad_parquet": 1}
    assert len(kept(items)) == 4


def test_a_damaged_row_group_loses_its_rows_alone(tmp_path: Path) -> None:
    downloads = [Download(n, f"caption {n}", image=picture(n, "PNG") + bytes([n]) * 3000) for n in range(9)]
    write_parquet(tmp_path, downloads)
    path = tmp_path / "00000.parquet"
    data = bytearray(path.read_bytes())
    column = next(
        column
        for column in (pq.ParquetFile(path).metadata.row_group(1).column(i) for i in range(20))
        if column.path_in_schema == "caption"
    )
    begin = column.dictionary_page_offset
    data[begin : begin + column.total_compressed_size] = bytes([255] * column.total_compressed_size)
    path.write_bytes(data)
    items = read_all(source(tmp_path))
    assert [sample.key for sample in kept(items)] == [f"00000.parquet/{n:09d}" for n in (0, 1, 2, 6, 7, 8)]
    assert reasons(items) == {"bad_parquet": 3}


def test_text_that_is_no_utf8_is_the_fault_of_its_row(tmp_path: Path) -> None:
    captions = pa.array([b"good", b"\xed\xa0\xbd", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"key": ["0", "1", "2"], "caption": captions, "jpg": [picture(n) for n in range(3)]})
    pq.write_table(table, tmp_path / "00000.parquet")
    items = read_all(source(tmp_path))
    assert [sample.text for sample in kept(items)] == ["good", "fine"]
    assert reasons(items) == {"bad_unicode": 1}


def test_rows_without_keys_or_images(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a"], "jpg": ["text"]})
    pq.write_table(table, tmp_path / "00001.parquet")
    table = pa.table({"caption": ["a", "b", "c"], "png": pa.array([picture(1, "PNG"), None, b""], pa.binary())})
    pq.write_table(table, tmp_path / "00000.parquet")
    items = read_all(source(tmp_path))
    assert [sample.key for sample in kept(items)] == ["00000.parquet/0"]
    assert reasons(items) == {"not_downloaded": 1, "empty_image": 1, "wrong_field": 1}


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    schema = pa.schema([("caption", pa.string()), ("jpg", pa.binary())])
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}
    with pq.ParquetWriter(path, schema, **options) as writer:
        images = [bytes([n % 256]) * 50_000 for n in range(2000)]
        writer.write_table(pa.table({"caption": ["x"] * 2000, "jpg": images}, schema=schema), row_group_size=2000)
    assert path.stat().st_size > 90_000_000
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    code = f"""
from pathlib import Path
import pyarrow
from megatron_vl.data.formats.parquet import read_rows
print(sum(1 for row in read_rows(Path({str(path)!r}), ("jpg",))), pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 2000
    assert peak < 30_000_000, "a few pages and a batch of rows, not the 100 MB of the row group"


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    write_parquet(tmp_path, [Download(0, "a")])
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"pip install 'megatron_vl\[data\]'"):
        read_all(source(tmp_path))
