"""Large JSON documents by elements: the same as parsed whole, from any shard; broken ones are refused."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.formats import json_stream
from megatron_vl.data.formats.json_stream import array_shards, iter_array, read_array
from megatron_vl.errors import DataError
from tests.helpers.data.reading import write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def elements(path: Path, size: int, key: str | None) -> list[tuple[int, str, Any]]:
    return [(e.index, e.key, e.value) for shard in array_shards(path, size, key) for e in read_array(shard)]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    value=st.lists(VALUES, max_size=8) | st.dictionaries(st.text(max_size=4), VALUES, max_size=8),
    around=st.none() | st.tuples(VALUES, VALUES),
    size=st.integers(1, 4),
    indent=st.none() | st.just(1),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_elements_are_those_of_the_document(
    tmp_path_factory: pytest.TempPathFactory,
    value: Any,
    around: tuple[Any, Any] | None,
    size: int,
    indent: int | None,
    ascii_only: bool,
    chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    document = value if around is None else {"before": around[0], "rows": value, "after": around[1]}
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="ignore")
    value = json.loads(path.read_text("utf-8"))
    value = value if around is None else value["rows"]
    key = None if around is None else "rows"
    pairs = value.items() if isinstance(value, dict) else (("", item) for item in value)
    expected = [(index, name, item) for index, (name, item) in enumerate(pairs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_BYTES", chunk)
        assert elements(path, size, key) == expected
        assert [(e.index, e.key, e.value) for e in iter_array(path, key)] == expected


@settings(derandomize=True, max_examples=100, deadline=None)
@given(cut=st.integers(0, 10_000), chunk=st.integers(1, 40))
def test_a_document_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int, chunk: int) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    whole = json.dumps({"info": {"n": [1.5e-7, True]}, "rows": [{"é": "ü"}, 12, "x"], "end": []}).encode()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"a\.json: "):
        patch.setattr(json_stream, "CHUNK_BYTES", chunk)
        array_shards(path, 1, "rows")


@pytest.mark.parametrize(
    "text",
    ["[1, 2,]", "[1 2]", "[,1]", "[1]]", '{"a": 1', '{"a"}', "[1] x", "[tru]", "7", "", "{1: 2}", "[1: 2]", "[1}"],
)
def test_text_that_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: "):
        array_shards(tmp_path / "a.json", 10)


def test_the_place_of_an_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": ["ü", nil]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"Expecting value at byte 14\); is the file complete"):
        array_shards(tmp_path / "a.json", 10, "é")


@pytest.mark.parametrize("text", ["[" * 200_000, "[" + "9" * 10_000 + "]"])
def test_nesting_and_numbers_that_overwhelm_the_parser_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="not valid JSON"):
        array_shards(tmp_path / "a.json", 10)


def test_an_element_beyond_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ELEMENT_CHARACTERS", 100)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 16)
    write_json(tmp_path / "a.json", ["x" * 1000])
    with pytest.raises(DataError, match="not valid JSON"):
        array_shards(tmp_path / "a.json", 10)


def test_bytes_that_are_no_utf8_do_not_end_the_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf["a", "\xff", "b"]')
    assert [value for _, _, value in elements(tmp_path / "a.json", 1, None)] == ["a", "\udcff", "b"]


def test_a_file_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [10, 11, 12, 13])
    shards = array_shards(path, 2)
    path.write_text("[10]")
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_array(shards[1]))


def test_a_document_in_a_zip(tmp_path: Path) -> None:
    rows = [{"n": number, "text": "é" * number} for number in range(50)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/rows.json", json.dumps(rows, ensure_ascii=False))
    assert [value for _, _, value in elements(tmp_path / "a.zip" / "in" / "rows.json", 7, None)] == rows


def test_memory_does_not_grow_with_the_document(tmp_path: Path) -> None:
    row = json.dumps({"question": "Is the mug to the left of the laptop?", "semantic": [{"argument": "mug"}] * 9})
    with (tmp_path / "big.json").open("w") as stream:
        stream.write("[" + row)
        for _ in range(40_000):
            stream.write("," + row)
        stream.write("]")
    assert (tmp_path / "big.json").stat().st_size > 10_000_000
    tracemalloc.start()
    count = sum(1 for shard in array_shards(tmp_path / "big.json", 10_000) for _ in read_array(shard))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_001
    assert peak < 4_000_000
