"""The inspector's page and tables: escaped, self-contained, bounded, true; errors that say what to type instead."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vl.cli import prepare
from megatron_vl.cli.inspect_data import main
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.prompting.tokenizer import find_vocab_file
from megatron_vl.errors import DataError
from megatron_vl.inspector.choice import RowChoice, choose_rows
from megatron_vl.inspector.overview import read_overview
from megatron_vl.inspector.thumbnails import make_thumbnails
from tests.test_architecture import imported_by
from tests.unit.inspector.hostile_data import CAPTIONS, SCRIPT, SOURCE, make_hostile_data_set


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_hostile_data_set(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def page(prefix: str) -> str:
    assert main([prefix]) == 0
    return Path(f"{prefix}.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(prefix: str, tmp_path: Path) -> str:
    """The data set once more, to be damaged."""
    for path in Path(prefix).parent.glob("set.*"):
        if path.suffix != ".html":
            shutil.copy(path, tmp_path)
    return str(tmp_path / "set")


class Tags(HTMLParser):
    """The elements of a page with their attributes and texts, and what a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        """Text directly inside elements, by tag and first class."""
        self.attributes: list[dict[str, str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes.append(values)
        self.fetched += [values[name] for name in ("src", "href", "xlink:href", "data", "srcset") if name in values]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(f"{tag}.{values.get('class', '').split(' ')[0]}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().startswith(f"{tag}.")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_is_well_formed_and_asks_for_nothing(page: str) -> None:
    tags = Tags(page)
    assert tags.fetched and all(target.startswith(("data:image/jpeg;base64,", "#")) for target in tags.fetched)
    assert not re.search(r"url\((?!#)|@import", page)
    assert not any(name.startswith("on") for values in tags.attributes for name in values)


def test_the_policy_allows_our_script_alone(page: str) -> None:
    (script,) = Tags(page).texts["script."]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(values["content"] for values in Tags(page).attributes if "http-equiv" in values)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "img-src data:" in policy


def test_hostile_texts_are_shown_as_they_are(page: str) -> None:
    tags = Tags(page)
    shown = "".join(tags.texts["span.run"])
    for caption in CAPTIONS[:4]:
        assert caption in shown
    assert SCRIPT not in page
    assert set(tags.texts["i.control"]) >= {"U+202E", "U+200B", "U+00A0", "U+000D"}
    assert {values["data-source"] for values in tags.attributes if "data-source" in values} >= {SOURCE}
    assert any("<i>'&" in values.get("data-key", "") for values in tags.attributes)


def test_what_became_of_all_records_is_told(prefix: str, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [text for text in Tags(page).texts["td."] if text.strip()]
    assert {"unreadable_image", "bad_json"} <= set(cells)
    numbers = Tags(page).texts["td.number"]
    assert main([prefix, "--summary"]) == 0
    table = capsys.readouterr().out.rpartition("\n\n")[2]
    for totals in RowStore(prefix).manifest.sources:
        figures = [str(totals.read), str(totals.kept), str(totals.read - totals.kept)]
        assert any(numbers[place : place + 3] == figures for place in range(len(numbers)))
        assert re.search(rf"^{re.escape(totals.source)} +{' +'.join(figures)}\n", table, flags=re.MULTILINE)
    assert [text for text in Tags(page).texts["div."] if "9<i>'&" in text]
    assert re.search(r"^ +1  unreadable_image +00000\.tar/9<i>'&", table, flags=re.MULTILINE)
    assert re.search(r"^ +1  bad_json  ", table, flags=re.MULTILINE)


def test_long_examples_are_cut_visibly(copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Path(f"{copy}.json")
    values = json.loads(manifest.read_text())
    for skip, example in zip(values["skips"], ("a" * 160, "b" * 161), strict=True):
        skip["examples"] = [example]
    manifest.write_text(json.dumps(values))
    assert main([copy, "--summary"]) == 0
    ends = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert "a" * 160 in ends and "b" * 159 + "…" in ends


def test_supervised_runs_are_marked(prefix: str, page: str) -> None:
    learned = [values for values in Tags(page).attributes if "learned" in values.get("class", "").split()]
    titles = [values["title"] for values in learned if "title" in values]
    covered = 0
    for title in titles:
        first, _, last = title.partition(" ")[2].partition("–")
        covered += int(last or first) - int(first) + 1
    store = RowStore(prefix)
    assert covered == sum(int(store.row(index).supervised.sum()) for index in range(len(store)))


def test_each_image_is_in_the_page_once(prefix: str, page: str) -> None:
    assert page.count("data:image/jpeg;base64,") == RowStore(prefix).manifest.num_stored_images
    shapes = [values for values in Tags(page).attributes if "points" in values]
    assert len(shapes) == 4


def test_only_several_pictures_of_a_segment_are_named_at_their_slots(prefix: str, page: str) -> None:
    """Each with the name below it; what follows a picture stands beside it."""
    tags, store = Tags(page), RowStore(prefix)
    rows = [row for row in range(len(store)) if any(key.key == "chat.json#0" for key in store.keys(row))]
    image_ids = [image_id for row in rows for image_id in store.row(row).image_ids.tolist()]
    names = tags.texts["i.name"]
    assert len(names) == 2 and set(names) <= {f"image {image_id}" for image_id in image_ids}
    assert all(f"{name}, 200 × 200" in tags.texts["span."] for name in names)
    parts = re.findall(r'<div class="(before|beside)">(.*?)</div>', page, flags=re.DOTALL)
    assert [kind for kind, _ in parts] == ["before", "beside", "beside"]
    first, second = parts[1][1], parts[2][1]
    assert "Picture 2:" in first and "(100,200),(300,400)" in first and "(250,125),(750,625)" in second
    assert page.count('<span class="slots">4 slots</span>') == store.manifest.num_images - 2


def test_rows_are_bounded_and_chosen(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main([prefix, "--output", str(path), "--rows", "2", "--first", "3", "--max-image-side", "16"]) == 0
    text = path.read_text(encoding="utf-8")
    assert re.findall(r'id="row(\d+)"', text) == ["3", "4"]
    assert list(tmp_path.iterdir()) == [path]


def test_choices(prefix: str) -> None:
    store = RowStore(prefix)
    every = list(range(len(store)))
    assert choose_rows(store, RowChoice(num_rows=1000)) == every
    chosen = [choose_rows(store, RowChoice(num_rows=4, seed=seed)) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(rows) == 4 and rows == sorted(rows) for rows in chosen)
    for seed in (None, 5):
        found = choose_rows(store, RowChoice(source="chats", seed=seed))
        assert found == [index for index in every if any(key.source == "chats" for key in store.keys(index))]
    assert choose_rows(store, RowChoice(source="chats", task="text")) == []


def test_figures_are_those_of_all_rows(prefix: str) -> None:
    store = RowStore(prefix)
    overview = read_overview(store)
    rows = [store.row(index) for index in range(len(store))]
    assert overview.row_lengths.tolist() == [len(row.tokens) for row in rows]
    assert overview.segment_lengths.tolist() == np.concatenate([row.segment_lengths for row in rows]).tolist()
    assert not overview.is_sampled
    some = read_overview(store, scanned_rows=3)
    assert some.is_sampled and some.row_lengths.tolist() == [len(rows[i].tokens) for i in (0, 3, 6)]


def test_a_row_of_many_segments_is_counted_without_its_tokens(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "ab"}) + "\n" for _ in range(150))
    (tmp_path / "text.jsonl").write_text(lines)
    recipe = "sources: [{name: t, type: text, path: text.jsonl}]\n"
    recipe += "seq_length: 512\nnum_queries: 4\nnum_bpe_tokens: 256\n"
    (tmp_path / "data.yaml").write_text(recipe)
    assert prepare.main([str(tmp_path / "data.yaml"), "--workers", "1", "--quiet"]) == 0
    store = RowStore(tmp_path / "data")
    assert [len(store.segment_lengths(row)) for row in range(len(store))] == [150]
    assert store.segment_lengths(0).tolist() == store.row(0).segment_lengths.tolist()


def test_thumbnails_are_small_and_true(prefix: str) -> None:
    store = RowStore(prefix)
    thumbs = make_thumbnails(store, [0, 1, 10_000], max_side=50)
    for index in (0, 1):
        thumb = thumbs[index]
        original = Image.open(io.BytesIO(store.image(index))).convert("RGB")
        small = Image.open(io.BytesIO(base64.b64decode(thumb.uri.partition(",")[2])))
        assert (thumb.width, thumb.height) == original.size
        assert small.size == (thumb.shown_width, thumb.shown_height) and max(small.size) <= 50
        found, expected = small.convert("RGB").getpixel((5, 5)), original.getpixel((5, 5))
        assert np.abs(np.array(found) - np.array(expected)).max() < 6
    assert "refers to image 10000" in thumbs[10_000].problem


def test_summary_is_aligned_and_true(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "--summary"]) == 0
    printed = capsys.readouterr().out
    assert "Page:" not in printed
    table = printed[printed.index("source ") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1
    store = RowStore(prefix)
    manifest = store.manifest
    assert [line.split()[0] for line in table[2:]] == [entry.source for entry in manifest.counts]
    assert f"{manifest.num_tokens:,}\n" in printed and f"{100 * manifest.fill:.1f} %" in printed
    lengths = sorted(len(store.row(index).tokens) for index in range(len(store)))
    (spread,) = re.findall(r"tokens in a row +(\d+) .* (\d+)\n", printed)
    assert spread == (str(lengths[0]), str(lengths[-1]))


def test_summary_needs_none_of_the_libraries_of_the_page(prefix: str) -> None:
    code = "import sys; from megatron_vl.cli.inspect_data import main; assert main(sys.argv[1:]) == 0"
    page = {"jinja2", "matplotlib", "PIL"}
    assert not imported_by(code, prefix, "--summary") & (page | {"torch"})
    assert imported_by(code, prefix, "--rows", "1") & (page | {"torch"}) == page


def test_summary_and_page_in_one_call(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "--summary", "--output", str(tmp_path / "new" / "p.html")]) == 0
    assert "Page:" in capsys.readouterr().out and (tmp_path / "new" / "p.html").is_file()


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error_before_the_work(
    prefix: str, copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows are damaged, which is not even noticed; a summary that would be printed is not."""
    path = Path(f"{copy}.tokens.bin")
    path.write_bytes(b"\x07" * path.stat().st_size)
    said = f"error: --output {tmp_path}: cannot be written (Is a directory)\n"
    assert error_of([copy, "--output", str(tmp_path)], capsys) == said
    before = sorted(tmp_path.iterdir())
    assert main([prefix, "--summary", "--output", str(path / "page.html")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "page.html: cannot be written (File exists)" in printed.err
    Path(f"{copy}.html").mkdir()
    assert "set.html: cannot be written (Is a directory)" in error_of([copy], capsys)
    assert sorted(tmp_path.iterdir()) == sorted([*before, Path(f"{copy}.html")])


def test_a_full_disk_is_an_error_and_leaves_nothing(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    said = error_of([prefix, "--rows", "1", "--output", str(tmp_path / "page.html")], capsys)
    assert said.endswith("page.html: cannot be written (No space left on device)\n") and said.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_prefix_names_those_that_exist(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path(prefix).parent)
    assert f"in {folder} there is {prefix}." in error_of([f"{folder}/sett"], capsys)
    assert f"in {folder} there is {prefix}." in error_of([folder], capsys)
    for ending in (".json", ".tokens.bin", ".images"):
        assert f"is a file of the data set {prefix}" in error_of([prefix + ending], capsys)
    assert f"none in {tmp_path}" in error_of([f"{tmp_path}/x"], capsys)
    assert f"no folder {tmp_path}/y" in error_of([f"{tmp_path}/y/x"], capsys)


def test_a_data_set_without_its_manifest_is_unfinished(copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"{copy}.json").unlink()
    said = f"{copy}.tokens.bin is there, but {copy}.json, which is written last, is not: the copy or the preparation"
    assert said in error_of([copy, "--summary"], capsys)
    with pytest.raises(DataError, match="written last, is not"):
        RowStore(copy)


@pytest.mark.parametrize("suffix", [".tokens.bin", ".tokens.idx", ".images.bin", ".keys.idx", ".json"])
def test_truncated_data_is_named(copy: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(copy + suffix)
    path.write_bytes(path.read_bytes()[:-3])
    for flag in ("--summary", "--rows=3"):
        assert str(path) in error_of([copy, flag], capsys)


@pytest.mark.parametrize("suffix", [".tokens.bin", ".keys.bin"])
def test_damage_of_the_same_size_is_named(copy: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(copy + suffix)
    path.write_bytes(b"\x07" * path.stat().st_size)
    assert f"{copy}, row 0" in error_of([copy], capsys)
    assert not Path(f"{copy}.html").exists()


def test_an_image_that_does_not_decode_is_said(copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At the picture, in the heading of its row, and on the terminal; all but the last image here."""
    path, store = Path(f"{copy}.images.bin"), RowStore(copy)
    shown = {row: set(store.row(row).image_ids.tolist()) for row in range(len(store))}
    last = store.image(store.manifest.num_stored_images - 1)
    path.write_bytes(b"\x07" * (path.stat().st_size - len(last)) + last)
    assert main([copy]) == 0
    tags = Tags(Path(f"{copy}.html").read_text(encoding="utf-8"))
    assert sum(text.startswith("image 0: unreadable_image") for text in tags.texts["span."]) == 1
    counts = {row: len(ids - {store.manifest.num_stored_images - 1}) for row, ids in shown.items()}
    said = [f"{count} unreadable image{'s' if count > 1 else ''}" for count in counts.values() if count]
    assert tags.texts["span.verdict"] == said and len(said) > 0
    first = next(row for row, count in counts.items() if count)
    number = f"{len(said)} problem{'s' if len(said) > 1 else ''}"
    assert f" MB, {number}, the first in row {first}: {said[0]})" in capsys.readouterr().out


def test_another_vocabulary_needs_its_file(copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = find_vocab_file().read_bytes().splitlines()[:256]
    lines[10], lines[11] = lines[11].split()[0] + b" 10", lines[10].split()[0] + b" 11"
    vocabulary = tmp_path / "other.tiktoken"
    vocabulary.write_bytes(b"\n".join(lines) + b"\n")
    manifest = Path(f"{copy}.json")
    values = json.loads(manifest.read_text())
    values["tokenizer_sha256"] = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(values))
    assert "--vocab-file" in error_of([copy], capsys)
    assert "expected" in error_of([copy, "--vocab-file", str(find_vocab_file())], capsys)
    assert main([copy, "--vocab-file", str(vocabulary)]) == 0
    values["num_bpe_tokens"] = 300
    manifest.write_text(json.dumps(values))
    assert "keeps 300 byte-pair tokens" in error_of([copy, "--vocab-file", str(vocabulary)], capsys)
    assert main([copy, "--summary"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "chat"], "has no such source, but .*chats.* Did you mean chats"),
        (["--task", "vqa"], "has no such task, but caption, chat, text"),
        (["--first", "10000"], r"--first 10000: .* has rows 0 to \d+\."),
        (["--first", "-1"], "--first -1"),
        (["--rows", "0"], "--rows 0: expected at least 1"),
        (["--seed", "-2"], "--seed -2"),
        (["--max-image-side", "3"], "--max-image-side 3: expected at least 16"),
    ],
)
def test_wishes_that_cannot_be_met(
    prefix: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(said, error_of([prefix, *arguments], capsys))


def test_the_page_says_what_was_asked(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    assert main([prefix, "--output", str(path), "--source", SOURCE, "--seed", "3"]) == 0
    text = Tags(path.read_text(encoding="utf-8")).texts["p.soft"]
    assert any(line.startswith(f"Chosen at random with seed 3, with a sample of source {SOURCE}") for line in text)
