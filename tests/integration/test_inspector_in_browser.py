"""The inspector's page in a browser: its script filters, nothing of the data runs, nothing is asked for, and boxes lie
where they should."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image

from megatron_vl.cli import prepare
from megatron_vl.cli.inspect_data import main
from megatron_vl.data.dataset.rows import RowStore
from tests.helpers.browser import Visit, needs_chromium, visit
from tests.unit.inspector.hostile_data import CAPTIONS, SCRIPT, SOURCE, make_hostile_data_set

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_hostile_data_set(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def path(prefix: str) -> Path:
    assert main([prefix]) == 0
    return Path(f"{prefix}.html")


class Shown(HTMLParser):
    """What of a page is to be seen: keys of segments by row, and what the filter says."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.said = ""
        self._row: list[str] | None = None
        self._in_output = False
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "details":
            self._row = None if "hidden" in values else self.rows.setdefault(str(values["id"]), [])
        if self._row is not None and "data-key" in values and "hidden" not in values:
            self._row.append(f"{values['data-source']}|{values['data-task']}|{values['data-key']}")
        self._in_output = tag == "output"

    def handle_data(self, data: str) -> None:
        if self._in_output:
            self.said += data
            self._in_output = False

    @property
    def segments(self) -> list[str]:
        return [segment for row in self.rows.values() for segment in row]


def open_with(path: Path, **filters: str) -> Shown:
    page = visit(f"{path.as_uri()}#{urlencode(filters, quote_via=quote)}")
    assert page.console == () and page.requested == ()
    return Shown(page.dom)


def segments_of(prefix: str) -> list[tuple[int, str]]:
    store = RowStore(prefix)
    return [(row, f"{k.source}|{k.task}|{k.key}") for row in range(len(store)) for k in store.keys(row)]


def test_without_a_filter_everything_is_shown(path: Path, prefix: str) -> None:
    shown = open_with(path)
    everything = segments_of(prefix)
    assert shown.segments == [segment for _, segment in everything]
    rows = len({row for row, _ in everything})
    assert shown.said == f"{rows} of {rows} rows, {len(everything)} segments"


@pytest.mark.parametrize(
    ("filters", "pattern"),
    [
        ({"source": SOURCE}, rf"{re.escape(SOURCE)}\|"),
        ({"task": "chat"}, r"\w+\|chat\|"),
        ({"source": "chats", "task": "text"}, r"\Anever"),
        ({"text": "PICTURE 2:"}, r".*chat\.json#0"),
        ({"text": SCRIPT}, r".*(00000\.tar/0<i>|text\.jsonl:3)"),
        ({"text": "chat.json#1", "source": "chats"}, r".*#1"),
    ],
)
def test_the_address_filters(path: Path, prefix: str, filters: dict[str, str], pattern: str) -> None:
    shown = open_with(path, **filters)
    fitting = [(row, segment) for row, segment in segments_of(prefix) if re.match(pattern, segment)]
    assert shown.segments == [segment for _, segment in fitting]
    assert list(shown.rows) == [f"row{row}" for row in sorted({row for row, _ in fitting})]


def test_a_source_that_the_rows_do_not_have_is_named(path: Path) -> None:
    shown = open_with(path, source="<b>none</b>")
    assert shown.said.startswith("These rows have no source “<b>none</b>”.")
    assert shown.segments == []


def test_nothing_of_the_data_runs(path: Path) -> None:
    dom = visit(path.as_uri()).dom
    assert "<title>Data set set</title>" in dom
    assert dom.count("<script") == 1 and "<img" not in dom
    assert CAPTIONS[0].replace("<", "&lt;").replace(">", "&gt;") in dom


def _with(path: Path, folder: Path, addition: str) -> Visit:
    spoilt = folder / "spoilt.html"
    spoilt.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{addition}"), encoding="utf-8")
    return visit(spoilt.as_uri())


@pytest.mark.parametrize(
    "addition", [SCRIPT, CAPTIONS[1].removeprefix('">'), "<svg onload=\"document.title='taken over'\"></svg>"]
)
def test_what_got_past_the_escaping_would_not_run_and_be_noticed_here(
    path: Path, tmp_path: Path, addition: str
) -> None:
    page = _with(path, tmp_path, addition)
    assert "<title>Data set set</title>" in page.dom
    assert any("Content Security Policy" in line for line in page.console)
    assert page.requested == ()


def test_the_browser_tells_of_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.com/x.png"><script>throw new Error("oh")</script>', encoding="utf-8")
    found = visit(page.as_uri())
    assert any("oh" in line for line in found.console)
    assert found.requested == ("http://example.com/x.png",)


def test_a_box_along_the_edges_has_its_whole_line(tmp_path: Path) -> None:
    """Left, right, above and below: two pixels in the color of shape 1."""
    Image.new("RGB", (200, 200), (140, 115, 7)).save(tmp_path / "a.png")
    ask, answer = "Picture 1: <img>a.png</img>?", "<box>(0,0),(999,999)</box>"
    turns = [{"from": "user", "value": ask}, {"from": "assistant", "value": answer}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    source = "{name: chats, type: qwen_vl_chat, path: chat.json, image_root: .}"
    sizes = "seq_length: 256\nnum_queries: 4\nnum_bpe_tokens: 256\n"
    (tmp_path / "set.yaml").write_text(f"sources: [{source}]\n{sizes}")
    assert prepare.main([str(tmp_path / "set.yaml"), "--workers", "1", "--quiet"]) == 0
    assert main([str(tmp_path / "set")]) == 0
    shot = tmp_path / "page.png"
    visit((tmp_path / "set.html").as_uri(), screenshot=shot, size=(1200, 2000))
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    ground = np.abs(pixels - np.array([140, 115, 7])).sum(axis=2) < 12
    y, x = (np.flatnonzero(ground.sum(axis=axis) > 50) for axis in (1, 0))
    stroke = np.abs(pixels - np.array([0x25, 0x63, 0xEB])).sum(axis=2) < 60
    across = stroke[(y[0] + y[-1]) // 2, x[0] - 6 : x[-1] + 7]
    down = stroke[y[0] - 6 : y[-1] + 7, (x[0] + x[-1]) // 2]
    assert [int(end.sum()) for line in (across, down) for end in (line[:20], line[-20:])] == [2, 2, 2, 2]


def test_a_box_lies_on_its_picture(path: Path, tmp_path: Path) -> None:
    """The second picture of a segment with two: a box a little above its middle, in the color of shape 2."""
    shot = tmp_path / "page.png"
    visit(f"{path.as_uri()}#text=Picture%202", screenshot=shot, size=(1200, 3000))
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    ground = np.abs(pixels - np.array([140, 115, 7])).sum(axis=2) < 12
    stroke = np.abs(pixels - np.array([0xB4, 0x53, 0x09])).sum(axis=2) < 12
    rows = np.flatnonzero(ground.sum(axis=1) > 50)
    columns = np.flatnonzero(ground.sum(axis=0) > 50)
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    assert 150 < bottom - top < 200 and 150 < right - left < 200
    y, x = np.nonzero(stroke[top : bottom + 1, left : right + 1])
    found = np.array([x.min(), y.min(), x.max(), y.max()]) / (bottom - top)
    assert found == pytest.approx([0.25, 0.125, 0.75, 0.625], abs=0.03)
