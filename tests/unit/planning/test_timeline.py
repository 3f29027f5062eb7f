"""The picture of a schedule, read back as XML."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from megatron_vl.planning.schedule import Pipeline
from megatron_vl.planning.simulation import StageTimes
from megatron_vl.planning.timeline import Drawing, Lane, draw
from tests.helpers.browser import needs_chromium, visit

SVG = "{http://www.w3.org/2000/svg}"
LANES = (Lane("pipeline rank 0, busy 90%", "V*48R"), Lane("pipeline rank 1, busy 80%", "L*32 <&"))


def drawn(micro_batches: int) -> ElementTree.Element:
    times = [StageTimes(1.0, 2.0), StageTimes(1.0, 2.0)]
    return ElementTree.fromstring(draw(Drawing.of(Pipeline(2, 1, micro_batches), times, "A title", LANES)))


def test_every_pass_is_drawn_where_it_runs() -> None:
    root = drawn(4)
    passes = [one for one in root.iter(f"{SVG}rect") if one.get("stroke-width")]
    assert len(passes) == 2 * 2 * 4
    scale = (1200 - 48) / 15.0  # (4 + 2 - 1) (1 + 2)
    assert float(passes[0].get("x", "")) == 24 and float(passes[0].get("width", "")) == pytest.approx(scale, abs=0.01)
    last = passes[7]
    assert float(last.get("x", "")) + float(last.get("width", "")) == pytest.approx(1200 - 24, abs=0.02)
    texts = ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]
    assert texts[0] == "A title" and "pipeline rank 1, busy 80%: L*32 <&" in texts
    assert {"forward", "backward", "waiting (bubble)"} <= set(texts)
    assert not list(root.iter(f"{SVG}line"))


def test_a_long_step_has_a_break() -> None:
    root = drawn(100)
    assert len(list(root.iter(f"{SVG}line"))) == 1
    assert any("92 more micro-batches" in "".join(one.itertext()) for one in root.iter(f"{SVG}text"))


@needs_chromium
def test_a_browser_takes_it_without_a_complaint(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "timeline.svg"
    times = [StageTimes(1.0, 2.0), StageTimes(1.0, 2.0)]
    path.write_text(draw(Drawing.of(Pipeline(2, 1, 4), times, "A title", LANES)), encoding="utf-8")
    seen = visit(path.as_uri())
    assert not seen.console and not seen.requested and "A title" in seen.dom
