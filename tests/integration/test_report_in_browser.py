"""The report on a phone and on a desk: what matters is within the window, and nothing covers anything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_vl.report.report import read_report, render_page
from tests.helpers.browser import needs_chromium, visit
from tests.unit.report.fake_run import write_fake_run

pytestmark = needs_chromium

PROBE = """<script>
const places = [...document.querySelectorAll("svg, .verdict, .tile, .track, .card, nav li, td.number")].map(item => {
  const box = item.getBoundingClientRect();
  return [item.closest("section")?.id ?? "", item.className.baseVal ?? item.className, box.right];
});
const before = [...document.querySelectorAll("td.time")].map(bar => {
  const cell = bar.previousElementSibling, words = document.createRange();
  words.selectNodeContents(cell);
  return bar.firstElementChild.getBoundingClientRect().left - words.getBoundingClientRect().right;
});
document.title = JSON.stringify({width: innerWidth, places, before});
</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_charts_verdicts_and_bars_are_within_the_window(tmp_path: Path, width: int) -> None:
    run_dir = write_fake_run(tmp_path / "run", num_steps=20, samples_per_task=1)
    page = tmp_path / "probe.html"
    page.write_text(render_page(read_report(run_dir), tmp_path).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = visit(page.as_uri(), size=(width, 900)).dom
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    found = json.loads(title[1].replace("&amp;", "&"))
    scrolled = ("training", "layouts", "data")  # tables of many columns, which can be moved
    outside = [place for place in found["places"] if place[2] > found["width"] and place[0] not in scrolled]
    assert outside == [] and len(found["places"]) > 40
    assert found["width"] <= max(width, 500) and min(found["before"]) > 0
