"""Raw files -> data set: nothing lost, nothing twice, the same bytes from any number of workers, and clear refusals."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli.prepare import main, output_prefix
from megatron_vl.data.dataset.manifest import read_manifest, verify_files
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.summary import summary_lines
from megatron_vl.data.prepare.workers import open_pool
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.prepared import (
    NUM_CAPTIONS,
    NUM_DOCUMENTS,
    QUERIES,
    RANKS,
    SEQ_LENGTH,
    make_data_set,
    png,
    recipe_values,
    write_raw,
    write_recipe,
)
from tests.helpers.data.reading import write_tar

TOKENIZER = QwenTokenizer(RANKS)


def samples_of(store: RowStore) -> dict[tuple[str, str], list[tuple[int, list[int], list[bool], list[bytes]]]]:
    """Every piece of every sample of a data set: start, tokens, supervision, images."""
    found: dict[tuple[str, str], list[tuple[int, list[int], list[bool], list[bytes]]]] = {}
    for index in range(len(store)):
        row, begin = store.row(index), 0
        images = [store.image(image) for image in row.image_ids.tolist()]
        for key, length in zip(store.keys(index), row.segment_lengths.tolist(), strict=True):
            tokens = row.tokens[begin : begin + length].tolist()
            count = tokens.count(TOKENIZER.special.img_start)
            mine, images = images[:count], images[count:]
            piece = (key.start, tokens, row.supervised[begin : begin + length].tolist(), mine)
            assert key.stop - key.start == length
            found.setdefault((key.source, key.key), []).append(piece)
            begin += length
        assert not images
    return {key: sorted(pieces) for key, pieces in found.items()}


def test_every_sample_is_there_once_with_its_own_image(tmp_path: Path) -> None:
    store = RowStore(make_data_set(tmp_path))
    found = samples_of(store)
    assert len(found) == NUM_CAPTIONS + NUM_DOCUMENTS
    for number in range(NUM_CAPTIONS):
        ((_, tokens, supervised, images),) = found["captions", f"{number // 10:05d}.tar/{number:04d}"]
        assert images == [png(number // 2)]
        text = TOKENIZER.decode(tokens)
        target = f" shade {'x' * (number % 7)} {number}<|endoftext|>"
        assert text == "<img>" + "<imgpad>" * QUERIES + "</img>Generate the caption in English:" + target
        assert sum(supervised) == len(TOKENIZER.encode(target[: -len("<|endoftext|>")])) + 1
        assert supervised[-sum(supervised) :] == [True] * sum(supervised)
    for number, line in enumerate((tmp_path / "text.jsonl").read_text().splitlines(), start=1):
        pieces = found["documents", f"text.jsonl:{number}"]
        text = TOKENIZER.decode([token for piece in pieces for token in piece[1]])
        assert text == json.loads(line)["text"].strip() + "<|endoftext|>"
        for start, tokens, supervised, _ in pieces:
            assert supervised == [start == 0] + [True] * (len(tokens) - 1)


def test_manifest_counts(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path)
    manifest, store = read_manifest(prefix), RowStore(prefix)
    assert {(count.source, count.task): count.samples for count in manifest.counts} == {
        ("captions", "caption"): NUM_CAPTIONS,
        ("documents", "text"): NUM_DOCUMENTS,
    }
    rows = [store.row(index) for index in range(len(store))]
    assert manifest.num_tokens == sum(len(row.tokens) for row in rows) == sum(count.tokens for count in manifest.counts)
    assert manifest.num_images == NUM_CAPTIONS
    assert manifest.num_stored_images == NUM_CAPTIONS // 2
    assert manifest.num_samples == NUM_CAPTIONS + NUM_DOCUMENTS
    assert manifest.num_segments == sum(len(row.segment_lengths) for row in rows)
    histogram = Counter(len(row.image_ids) for row in rows)
    assert manifest.images_per_row == tuple(histogram[count] for count in range(max(histogram) + 1))
    assert store.row_images.tolist() == [len(row.image_ids) for row in rows]
    assert max(len(row.tokens) for row in rows) <= SEQ_LENGTH
    assert manifest.fill > 0.9
    assert manifest.skips == ()
    verify_files(prefix)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(write_raw(tmp_path)))
    for workers in (1, 3):
        with open_pool(workers) as pool:
            prepare(recipe, tmp_path / str(workers), pool=pool, progress=False)
    files = sorted(path.name[2:] for path in tmp_path.glob("1.*"))
    assert files == ["images.bin", "images.idx", "json", "keys.bin", "keys.idx", "sha256", "tokens.bin", "tokens.idx"]
    for name in files:
        assert (tmp_path / f"1.{name}").read_bytes() == (tmp_path / f"3.{name}").read_bytes(), name
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*unfinished*"))


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    write_raw(tmp_path)
    write_tar(
        tmp_path / "captions/00009.tar",
        [
            ("0.png", b"no image"),
            ("0.txt", b"a"),
            ("1.png", png(1)),
            ("1.txt", b"far too long " * 20),
            ("3.png", png(3)),
            ("3.txt", b"good"),
        ],
    )
    manifest = read_manifest(make_data_set(tmp_path))
    skips = {(skip.source, skip.reason): skip for skip in manifest.skips}
    assert {key: skip.count for key, skip in skips.items()} == {
        ("captions", "unreadable_image"): 1,
        ("captions", "too_long"): 1,
    }
    assert skips["captions", "unreadable_image"].examples[0].startswith("00009.tar/0: image")
    assert manifest.counts[0].samples == NUM_CAPTIONS + 1
    lines = [line.strip() for line in summary_lines(manifest)]
    named = [lines[number + 1] for number, line in enumerate(lines) if line.startswith("unreadable_image")]
    assert len(named) == 1 and "00009.tar/0" in named[0]


@pytest.mark.parametrize(("weight", "expected"), [(2, 60), (0.5, 15), (1.5, 45)])
def test_weight_repeats_a_source(tmp_path: Path, weight: float, expected: int) -> None:
    values = recipe_values()
    values["sources"][0]["weight"] = weight
    found = samples_of(RowStore(make_data_set(tmp_path, **values)))
    copies = [len(pieces) for key, pieces in found.items() if key[0] == "captions"]
    assert sum(copies) == expected
    assert max(copies) <= weight + 1


def test_limit_keeps_the_first_samples(tmp_path: Path) -> None:
    values = recipe_values()
    values["sources"][0]["limit"] = 13
    found = samples_of(RowStore(make_data_set(tmp_path, **values)))
    keys = sorted(key[1] for key in found if key[0] == "captions")
    assert keys == [f"{number // 10:05d}.tar/{number:04d}" for number in range(13)]


@pytest.mark.parametrize("mode", ["task", "none"])
def test_other_ways_of_packing(tmp_path: Path, mode: str) -> None:
    store = RowStore(make_data_set(tmp_path, pack={"mode": mode}))
    assert store.manifest.packed == (mode == "task")
    for index in range(len(store)):
        keys = store.keys(index)
        assert len({key.task for key in keys}) == 1
        assert mode == "task" or len(keys) == 1
    assert len(samples_of(store)) == NUM_CAPTIONS + NUM_DOCUMENTS


def test_images_per_row_are_limited(tmp_path: Path) -> None:
    store = RowStore(make_data_set(tmp_path, pack={"max_images": 1}, seq_length=128))
    assert int(store.row_images.max()) == 1


def test_a_failed_preparation_leaves_the_old_data_set(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("set.*")}
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(DataError, match=r"text\.jsonl"):
        make_data_set(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("set.*")} == before
    verify_files(prefix)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample is left"):
        make_data_set(tmp_path, sources=[{"name": "c", "type": "img2dataset", "path": "captions"}], max_sample_length=5)


def test_empty_sources_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").touch()
    (tmp_path / "captions").mkdir()
    with pytest.raises(DataError, match=r"no sample is left to write:\n  source 't': it is empty"):
        make_data_set(tmp_path, sources=[{"name": "t", "type": "text", "path": "text.jsonl"}])


@pytest.mark.parametrize("suffix", ["tokens.bin", "images.bin", "images.idx", "keys.bin"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    prefix = make_data_set(tmp_path)
    path = Path(f"{prefix}.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"set\.{suffix} has {len(content) - 1} bytes"):
        RowStore(prefix)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        RowStore(prefix)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="SHA-256"):
        verify_files(prefix)


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path)
    path = Path(f"{prefix}.json")
    values = json.loads(path.read_text())
    for content, message in (
        ("{", "not JSON"),
        (json.dumps({**values, "format_version": 99}), "format_version is 99"),
        (json.dumps({key: value for key, value in values.items() if key != "num_rows"}), "num_rows"),
        (json.dumps({**values, "num_rows": "3"}), "num_rows: found '3' .a string., expected an integer"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_manifest(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lenght": 64}, "unknown key 'seq_lenght'. Did you mean seq_length"),
        ({"sources": []}, "sources: expected a list"),
        ({"sources": [{"name": "a", "type": "text", "path": "t", "weight": 0}]}, r"sources\[0\].weight"),
        (
            {"sources": [{"name": "a", "type": "text", "path": "t", "weight": 1000000}]},
            r"sources\[0\].weight: found 1000000, expected a number above 0 and at most 1000",
        ),
        ({"mixture": {"max_repeats": 1001}}, "max_repeats: found 1001, expected a number above 0 and at most 1000"),
        ({"vocab_file": "nofile"}, r"data\.yaml: vocab_file: .*nofile: no such file; expected Qwen's"),
        ({"vocab_file": 3}, "vocab_file: found 3, expected a path"),
        ({"sources": [{"name": "a", "type": "text", "path": "t", "limit": 0.5}]}, r"sources\[0\].limit"),
        ({"sources": [{"name": "a", "type": "text", "path": "t"}] * 2}, "'a' occurs twice"),
        ({"sources": [{"name": "a", "type": "txt", "path": "t"}]}, "unknown source type 'txt'"),
        ({"pack": {"mode": "dense"}}, "pack.mode: found 'dense' .a string., expected one of mixed"),
        ({"pack": {"max_images": 1000}}, "expected an integer from 1 to 127"),
        ({"seq_length": "64"}, "seq_length: found '64' .a string., expected an integer of at least 1"),
        ({"max_sample_length": 65}, "max_sample_length 65 exceeds seq_length 64"),
        ({"chat_style": "other"}, "chat_style: found 'other'"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path, **changes))


def test_a_vocabulary_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.tiktoken").touch()
    recipe = load_recipe(write_recipe(tmp_path, vocab_file="own.tiktoken"))
    assert recipe.vocab_file == str(tmp_path / "own.tiktoken")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path)
    values = {key: value for key, value in recipe_values().items() if not key.startswith("num_")}
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(json.dumps(values))
    assert main([str(recipe), "--quiet"]) == 2
    assert "num_queries is missing" in capsys.readouterr().err
    out = f"{tmp_path / 'out'}/"
    assert main([str(recipe), "--output", out, "--workers", "1", "--model-preset", "tiny", "--quiet"]) == 0
    assert "captions" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out" / "mix")
    assert (manifest.num_queries, manifest.num_bpe_tokens) == (16, 2048)
    assert main([str(recipe), "--output", out, "--verify"]) == 0
    Path(f"{out}mix.keys.bin").write_bytes(b"")
    assert main([str(recipe), "--output", out, "--verify"]) == 2
    assert output_prefix(None, recipe) == tmp_path / "mix"
    assert output_prefix(str(tmp_path / "p"), recipe) == tmp_path / "p"


@pytest.mark.parametrize("change", ["caption", "other image"])
def test_a_folder_of_pairs_is_read_again_when_its_captions_change(tmp_path: Path, change: str) -> None:
    """The time of a folder does not change when a file in it is written again."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(f"old {number}")
    source = {"name": "c", "type": "img2dataset", "path": "pairs"}
    before = Path(make_data_set(tmp_path, "first", sources=[source]) + ".tokens.bin").read_bytes()
    recipe = load_recipe(write_recipe(tmp_path, sources=[source]))
    prepare(recipe, tmp_path / "kept", progress=False, keep_parts=True)
    state = folder.stat()
    if change == "caption":
        (folder / "1.txt").write_text("new 1")
    else:
        (folder / "2.png").rename(folder / "3.png")
    os.utime(folder, ns=(state.st_atime_ns, state.st_mtime_ns))
    prepare(recipe, tmp_path / "kept", progress=False, keep_parts=True)
    assert (tmp_path / "kept.tokens.bin").read_bytes() != before
