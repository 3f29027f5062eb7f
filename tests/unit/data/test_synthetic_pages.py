"""Pages: quadrilaterals stay on their text through perspective; fonts and photographs are what they claim."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from megatron_vl.data.synthetic import fonts as fonts_module
from megatron_vl.data.synthetic.config import FULL, TINY, PageConfig
from megatron_vl.data.synthetic.fonts import Font, find_fonts
from megatron_vl.data.synthetic.geometry import perspective
from megatron_vl.data.synthetic.layout import LineBox, PagePlan, wrap
from megatron_vl.data.synthetic.lexicon import WORDS, paragraph
from megatron_vl.data.synthetic.page import PageRenderer, draw_line
from megatron_vl.data.synthetic.photos import PHOTOS, find_photos

PILLOW = Font("Pillow", None)
SMALL_FULL = dataclasses.replace(
    FULL.page, width=(200, 320), height=(200, 300), line_height=(14, 30), perspective=(0.0, 25.0)
)


def clean(config: PageConfig) -> PageConfig:
    return dataclasses.replace(
        config, max_noise=0, max_blur=0, contrast=0, shadow=0, jpeg_quality=(95, 95), background=False
    )


def renderer(config: PageConfig, seed: int = 0) -> PageRenderer:
    return PageRenderer(config, fonts=(PILLOW,), chinese=(), seed=seed)


coordinate = st.floats(-0.2, 0.2)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(moves=st.lists(coordinate, min_size=8, max_size=8))
def test_perspective_takes_the_rectangle_to_its_corners(moves: list[float]) -> None:
    square = ((0, 0), (200, 0), (200, 100), (0, 100))
    pairs = list(zip(moves[::2], moves[1::2], strict=True))
    a, b, c, d = [(x + 100 * dx, y + 50 * dy) for (x, y), (dx, dy) in zip(square, pairs, strict=True)]
    view = perspective(200, 100, (a, b, c, d))
    assert np.allclose(view.rectangle(0, 0, 200, 100), [a, b, c, d], atol=1e-6)
    assert np.allclose(
        perspective(200, 100, square).rectangle(20, 30, 40, 10), [(20, 30), (60, 30), (60, 40), (20, 40)]
    )


def test_pixels_move_where_the_points_move() -> None:
    view = perspective(120, 120, ((10, 20), (110, 5), (100, 115), (5, 90)))
    image = Image.new("L", (120, 120))
    ImageDraw.Draw(image).rectangle((50, 70, 53, 73), fill=255)
    seen = np.asarray(view.warp(image, (120, 120)), dtype=float)
    y, x = (float((grid * seen).sum() / seen.sum()) for grid in np.mgrid[0:120, 0:120])
    assert np.allclose((x + 0.5, y + 0.5), view.point(52, 72), atol=0.3)


@pytest.mark.parametrize("config", [TINY.page, SMALL_FULL], ids=["tiny", "full"])
@pytest.mark.parametrize("seed", range(4))
def test_ink_lies_inside_the_quads_and_every_quad_has_ink(config: PageConfig, seed: int) -> None:
    page = renderer(clean(config)).draw(Random(seed), split="train", heldout_percent=10)
    image = Image.open(io.BytesIO(page.image))
    assert image.size == (page.width, page.height)
    ink = np.asarray(image.convert("L")) < 110
    inside = Image.new("1", image.size)
    for line in page.lines:
        here = Image.new("1", image.size)
        ImageDraw.Draw(here).polygon(line.quad, fill=1)
        share = ink[np.asarray(here)].mean()
        assert 0.02 < share < 0.6, (line.text, share)
        ImageDraw.Draw(inside).polygon(line.quad, fill=1)
        ImageDraw.Draw(inside).line([*line.quad, line.quad[0]], fill=1, width=3)
    bright = np.asarray(image.convert("L")) > 150
    stray = ink & ~np.asarray(inside) & _surrounded(bright)
    assert stray.sum() == 0


def _surrounded(bright: np.ndarray) -> np.ndarray:
    """Pixels with paper around them: the desk beyond the paper's edge is dark too."""
    rows = np.maximum.accumulate(bright, 1) & np.maximum.accumulate(bright[:, ::-1], 1)[:, ::-1]
    columns = np.maximum.accumulate(bright, 0) & np.maximum.accumulate(bright[::-1], 0)[::-1]
    return rows & columns


def test_tiny_pages_use_the_closed_lexicon_and_both_splits_differ() -> None:
    pages = renderer(TINY.page)
    rng = Random(0)
    plans = {"train": set(), "heldout": set()}
    for split, count in (("train", 200), ("heldout", 60)):
        for _ in range(count):
            page = pages.draw(rng, split=split, heldout_percent=10)
            assert 1 <= len(page.lines) <= 2
            assert all(line.text in WORDS for line in page.lines)
            plans[split].add(tuple((line.text, line.quad) for line in page.lines))
    assert not plans["train"] & plans["heldout"]
    assert len(plans["heldout"]) > 50


def test_flat_words_begin_at_patch_borders() -> None:
    flat = dataclasses.replace(clean(TINY.page), perspective=(0.0, 0.0))
    pages = renderer(flat)
    corners = {
        value
        for seed in range(40)
        for line in pages.draw(Random(seed), split="train", heldout_percent=10).lines
        for point in line.quad
        for value in point
    }
    assert all(value % 14 == pytest.approx(0, abs=1e-9) or value % 14 == pytest.approx(14) for value in corners)


def test_a_page_does_not_depend_on_what_was_drawn_before() -> None:
    first = renderer(TINY.page).draw(Random(9), split="train", heldout_percent=10)
    other = renderer(TINY.page)
    other.draw(Random(1), split="train", heldout_percent=10)
    assert other.draw(Random(9), split="train", heldout_percent=10) == first


@pytest.mark.parametrize("language", ["en", "zh"])
def test_wrapped_lines_fit_and_keep_every_character(language: fonts_module.Language) -> None:
    font = PILLOW.load_height(20)
    text = paragraph(Random(1), 200, language)
    lines = wrap(text, font, 180, language)
    assert len(lines) > 3
    assert all(font.getlength(line) <= 180 for line in lines)
    assert (" " if language == "en" else "").join(lines) == text


def test_a_line_is_drawn_as_large_as_its_box() -> None:
    mask = draw_line(PILLOW, LineBox("page", 0, 0, 56, 28))
    assert mask.size == (56, 28)
    assert mask.getextrema()[1] > 200


def test_the_key_tells_pages_apart_by_what_can_be_read() -> None:
    corners = ((0, 0), (84, 0), (84, 84), (0, 84))
    plan = PagePlan(84, 84, (LineBox("page", 0, 28, 56, 28),), corners, PILLOW, "en")
    moved = dataclasses.replace(plan, lines=(LineBox("page", 14, 28, 56, 28),))
    other_font = dataclasses.replace(plan, font=Font("Other", Path("x.ttf")))
    assert plan.key == other_font.key != moved.key


def test_english_needs_no_font_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts_module, "_font_files", lambda folders: iter(()))
    assert [font.name for font in find_fonts("en", 5)] == ["Pillow"]
    assert find_fonts("zh", 5) == ()


def test_broken_and_unfit_fonts_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fonts_module, "FONT_FOLDERS", (str(tmp_path),))
    (tmp_path / "Broken.ttf").write_bytes(b"no font")
    (tmp_path / "BrokenCJK.otf").write_bytes(b"no font")
    assert "Broken" not in [font.name for font in find_fonts("en", 100)]
    assert find_fonts("zh", 100) == ()


def test_a_chinese_font_draws_chinese_pages_if_there_is_one() -> None:
    chinese = find_fonts("zh", 2)
    if not chinese:
        pytest.skip("no Chinese font on this machine")
    config = dataclasses.replace(clean(SMALL_FULL), chinese_share=1.0)
    page = PageRenderer(config, fonts=(PILLOW,), chinese=chinese, seed=0).draw(
        Random(0), split="train", heldout_percent=10
    )
    assert page.language == "zh"
    assert any("\u4e00" <= letter <= "\u9fff" for line in page.lines for letter in line.text)


def test_photographs_are_split_by_name_and_exist_where_scikit_image_is() -> None:
    assert len({photo.file for photo in PHOTOS}) == len(PHOTOS)
    found = find_photos("train") + find_photos("heldout")
    pytest.importorskip("skimage")
    assert len(found) == len(PHOTOS)
    assert not {p.file for p, _ in find_photos("train")} & {p.file for p, _ in find_photos("heldout")}
