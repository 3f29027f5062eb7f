"""Files that Megatron-Core reads too, rows that come back as they were, and damage that is found when it is opened."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.dataset.indexed import IndexedFile, write_index
from megatron_vl.data.dataset.rows import decode_row, encode_row, join_tokens
from megatron_vl.data.sample import PackedRow
from megatron_vl.errors import DataError

SEQUENCES = [np.arange(n, dtype=np.int32) * 7 for n in (3, 0, 5, 1)]


def write(prefix: Path) -> Path:
    Path(f"{prefix}.bin").write_bytes(b"".join(sequence.tobytes() for sequence in SEQUENCES))
    lengths = np.array([len(sequence) for sequence in SEQUENCES])
    index = write_index(prefix, lengths, "int32", np.arange(len(SEQUENCES)))
    content = Path(f"{prefix}.idx").read_bytes()
    assert (index.size, index.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return prefix


def test_sequences_come_back(tmp_path: Path) -> None:
    with IndexedFile(write(tmp_path / "a"), with_modes=True) as file:
        assert len(file) == 4
        assert file.modes is not None
        assert file.modes.tolist() == [0, 1, 2, 3]
        for index, sequence in enumerate(SEQUENCES):
            assert np.array_equal(file[index], sequence)
        assert np.array_equal(np.frombuffer(file.read_bytes(2, start=1, stop=3), dtype=np.int32), SEQUENCES[2][1:3])
        with pytest.raises(IndexError, match="sequence 4 of 4"):
            file[4]


def test_megatron_core_reads_the_files(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(write(tmp_path / "a")), multimodal=True)
    assert len(dataset) == 4
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    for index, sequence in enumerate(SEQUENCES):
        found, mode = dataset[index]
        assert np.array_equal(found, sequence)
        assert mode == index


def test_megatron_core_wrote_the_same_bytes(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    ours = write(tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    for mode, sequence in enumerate(SEQUENCES):
        builder.add_item(torch.from_numpy(sequence), mode)
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda bin_path, idx_path: cut(bin_path, 4), ".bin"),
        (lambda bin_path, idx_path: bin_path.write_bytes(b""), ".bin"),
        (lambda bin_path, idx_path: bin_path.unlink(), ".bin"),
        (lambda bin_path, idx_path: cut(idx_path, 1), ".idx"),
        (lambda bin_path, idx_path: idx_path.write_bytes(b""), ".idx"),
        (lambda bin_path, idx_path: idx_path.unlink(), ".idx"),
        (lambda bin_path, idx_path: overwrite(idx_path, 0, b"X"), ".idx"),
        (lambda bin_path, idx_path: overwrite(idx_path, 17, b"\xff"), ".idx"),
        (lambda bin_path, idx_path: overwrite(idx_path, 18, b"\xff"), ".idx"),
        (lambda bin_path, idx_path: overwrite(idx_path, 34, b"\x04"), ".idx"),
        (lambda bin_path, idx_path: overwrite(idx_path, 34 + 4 * 4, b"\x04"), ".idx"),
    ],
    ids=[
        "bin cut",
        "bin empty",
        "bin gone",
        "idx cut",
        "idx empty",
        "idx gone",
        "magic",
        "type",
        "count",
        "length",
        "offset",
    ],
)
def test_damage_is_found_when_opened(tmp_path: Path, damage: Callable[[Path, Path], None], named: str) -> None:
    prefix = write(tmp_path / "a")
    damage(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    with pytest.raises(DataError, match=rf"a\{named}"):
        IndexedFile(prefix, with_modes=True)


def test_data_cut_while_open_is_found_when_read(tmp_path: Path) -> None:
    with IndexedFile(write(tmp_path / "a"), with_modes=True) as file:
        cut(tmp_path / "a.bin", 4)
        assert np.array_equal(file[2], SEQUENCES[2])
        with pytest.raises(DataError, match="sequence 3 has 0 of 4 bytes"):
            file[3]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 151_859), st.booleans()), max_size=30),
    st.lists(st.integers(0, 2**31 - 1), max_size=4),
    st.data(),
)
def test_rows_come_back(tokens: list[tuple[int, bool]], image_ids: list[int], data: st.DataObject) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    row = PackedRow(
        tokens=np.array([token for token, _ in tokens], dtype=np.int32),
        supervised=np.array([learned for _, learned in tokens], dtype=np.bool_),
        segment_lengths=np.diff([0, *borders, len(tokens)]).astype(np.int32),
        image_ids=np.array(image_ids, dtype=np.int64),
    )
    segments = np.split(join_tokens(row.tokens, row.supervised), borders)
    back = decode_row(encode_row(segments, row.image_ids), "row")
    for name, value in vars(row).items():
        assert np.array_equal(getattr(back, name), value), name
        assert getattr(back, name).dtype == value.dtype, name


@pytest.mark.parametrize("stored", [[], [1], [1, 0, 3, 5], [-1, 0], [2, 1, 1, 1]])
def test_a_row_that_contradicts_itself_is_named(stored: list[int]) -> None:
    with pytest.raises(DataError, match="set, row 7"):
        decode_row(np.array(stored, dtype=np.int32), "set, row 7")


def test_too_many_open_files_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a")

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"a\.bin: cannot be opened \(Too many open files\)\..* \(ulimit -n\)"):
        IndexedFile(prefix, with_modes=True)
