"""Pages: quadrilaterals stay on their text through perspective; fonts and photographs are what they claim."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from megatron_vl.data.synthetic import fonts as fonts_module
from megatron_vl.data.synthetic import page as page_module
from megatron_vl.data.synthetic.config import FULL, TINY, PageConfig
from megatron_vl.data.synthetic.fonts import Font, find_fonts
from megatron_vl.data.synthetic.geometry import elastic, enclose, outline, perspective
from megatron_vl.data.synthetic.layout import LineBox, PagePlan, plan_lines, wrap
from megatron_vl.data.synthetic.lexicon import WORDS, Corpus, paragraph
from megatron_vl.data.synthetic.page import PageRenderer, draw_line
from megatron_vl.data.synthetic.photos import PHOTOS, find_photos
from megatron_vl.errors import ConfigError

PILLOW = Font("Pillow", None)
SMALL_FULL = dataclasses.replace(
    FULL.page, width=(200, 320), height=(200, 300), line_height=(14, 30), perspective=(0.0, 25.0), max_columns=2
)


def clean(config: PageConfig) -> PageConfig:
    none: dict[str, Any] = {"max_noise": 0, "max_blur": 0, "motion_blur": 0, "contrast": 0, "shadow": 0, "tint": 0}
    flat: dict[str, Any] = {"rotation": 0, "elastic": 0, "paper_scale": (1.0, 1.0)}
    return dataclasses.replace(config, **none, **flat, jpeg_quality=(95, 95), background=False)


def renderer(config: PageConfig, seed: int = 0) -> PageRenderer:
    return PageRenderer(config, fonts=(PILLOW,), chinese=(), seed=seed)


def points(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, dtype=np.float64)


coordinate = st.floats(-0.2, 0.2)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(moves=st.lists(coordinate, min_size=8, max_size=8))
def test_perspective_takes_the_rectangle_to_its_corners(moves: list[float]) -> None:
    square = ((0, 0), (200, 0), (200, 100), (0, 100))
    pairs = list(zip(moves[::2], moves[1::2], strict=True))
    a, b, c, d = [(x + 100 * dx, y + 50 * dy) for (x, y), (dx, dy) in zip(square, pairs, strict=True)]
    view = perspective(200, 100, (a, b, c, d))
    assert np.allclose(view.points(points(*square)), [a, b, c, d], atol=1e-6)
    inner = points((20, 30), (60, 30), (60, 40), (20, 40))
    assert np.allclose(perspective(200, 100, square).points(inner), inner)


def middle_of(seen: Image.Image) -> tuple[float, float]:
    """The middle of what is bright."""
    levels = np.asarray(seen, dtype=float)
    y, x = (float((grid * levels).sum() / levels.sum()) for grid in np.mgrid[0 : seen.height, 0 : seen.width])
    return x + 0.5, y + 0.5


def test_pixels_move_where_the_points_move() -> None:
    view = perspective(120, 120, ((10, 20), (110, 5), (100, 115), (5, 90)))
    image = Image.new("L", (120, 120))
    ImageDraw.Draw(image).rectangle((50, 70, 53, 73), fill=255)
    assert np.allclose(middle_of(view.warp(image, (120, 120))), view.points(points((52, 72)))[0], atol=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_uneven_paper_moves_pixels_where_it_moves_points(seed: int) -> None:
    field = elastic((300, 200), 8.0, np.random.default_rng(seed))
    image = Image.new("L", (300, 200))
    x, y = Random(seed).randint(20, 270), Random(seed + 9).randint(20, 170)
    ImageDraw.Draw(image).rectangle((x, y, x + 3, y + 3), fill=255)
    seen = field.points(points((x + 2, y + 2)))[0]
    assert np.allclose(middle_of(field.warp(image)), seen, atol=0.35)
    assert np.hypot(*(seen - (x + 2, y + 2))) > 0.5


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), amplitude=st.floats(0, 11.9), x=st.floats(0, 300), y=st.floats(0, 200))
def test_uneven_paper_is_inverted_exactly_and_moves_little(seed: int, amplitude: float, x: float, y: float) -> None:
    field = elastic((300, 200), amplitude, np.random.default_rng(seed))
    seen = field.points(points((x, y)))
    assert np.allclose(seen + field.shift(seen), (x, y), atol=1e-3)
    assert np.hypot(*(seen[0] - (x, y))) <= amplitude + 1e-9


def test_paper_that_would_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="folds the paper"):
        elastic((300, 200), 12.0, np.random.default_rng(0))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), amplitude=st.floats(0, 11.9), width=st.integers(1, 250), height=st.integers(1, 150))
def test_a_label_encloses_the_whole_outline(seed: int, amplitude: float, width: int, height: int) -> None:
    field = elastic((300, 200), amplitude, np.random.default_rng(seed))
    view = perspective(300, 200, ((10, 20), (290, 5), (280, 195), (5, 170)))
    sides = [field.points(view.points(side)) for side in outline(20, 30, width, height)]
    quad = np.array(enclose(sides))
    for start, end in zip(quad, np.roll(quad, -1, axis=0), strict=True):
        along = (end - start) / np.hypot(*(end - start))
        beyond = (np.concatenate(sides) - start) @ np.array([along[1], -along[0]])
        if min(width, height) > 4 * amplitude:
            assert beyond.max() < 1e-6


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


EFFECTS = {
    "rotation": {"rotation": 30.0, "perspective": (0.0, 0.0)},
    "perspective": {"perspective": (0.0, 60.0)},
    "small paper": {"paper_scale": (0.5, 0.6)},
    "elastic": {"elastic": 6.0},
    "blur": {"max_blur": 1.5, "motion_blur": 5},
    "light": {"contrast": 0.25, "shadow": 0.5, "tint": 0.3, "max_noise": 12.0},
    "JPEG": {"jpeg_quality": (50, 50)},
    "all": {"rotation": 10.0, "paper_scale": (0.7, 1.0), "elastic": 3.0, "max_blur": 1.5, "motion_blur": 5},
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_marker_stays_inside_its_quad_through_every_effect(
    monkeypatch: pytest.MonkeyPatch, effect: str, seed: int
) -> None:
    """Lines are drawn as full boxes: after the effect all ink is in the quads, and the quads are full of ink."""
    monkeypatch.setattr(page_module, "draw_line", lambda line: Image.new("L", (line.width, line.height), 255))
    monkeypatch.setattr(page_module, "PAPERS", ((250, 250, 250),))
    monkeypatch.setattr(page_module, "DESKS", ((250, 250, 250),))
    config = dataclasses.replace(clean(SMALL_FULL), **EFFECTS[effect])
    page = renderer(config, seed).draw(Random(seed), split="train", heldout_percent=10)
    ink = np.asarray(Image.open(io.BytesIO(page.image)).convert("L")) < 128
    covered = np.zeros_like(ink)
    for line in page.lines:
        mask = Image.new("L", (page.width, page.height))
        ImageDraw.Draw(mask).polygon(line.quad, fill=255)
        inner, outer = (np.asarray(mask.filter(kind(3))) > 0 for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
        assert inner.sum() > 50 and ink[inner].mean() > (0.85 if "elastic" in EFFECTS[effect] else 0.97), line
        covered |= outer
    assert page.lines and (ink & ~covered).sum() == 0


def test_every_corner_of_the_paper_is_in_the_picture() -> None:
    config = dataclasses.replace(FULL.page, rotation=45.0)
    for seed in range(30):
        plan = plan_lines(Random(seed), config, (PILLOW,), "en", paragraph)
        assert all(-1e-6 <= x <= plan.width + 1e-6 and -1e-6 <= y <= plan.height + 1e-6 for x, y in plan.corners)


def test_lines_of_a_page_do_not_overlap() -> None:
    config = dataclasses.replace(FULL.page, vertical_share=0.5)
    columns = set()
    for seed in range(40):
        plan = plan_lines(Random(seed), config, (PILLOW,), "zh" if seed % 2 else "en", lambda rng, n, _: "Ab c de " * n)
        for number, a in enumerate(plan.lines):
            assert a.x >= 0 and a.x + a.width <= plan.width and a.y >= 0 and a.y + a.height <= plan.height
            for b in plan.lines[:number]:
                apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
                assert apart, (seed, a, b)
        columns |= {line.vertical for line in plan.lines}
    assert columns == {False, True}


def test_pages_lie_on_the_pictures_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (90, 40), (200, 30, 30)).save(tmp_path / "sub" / "red.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    config = dataclasses.replace(clean(SMALL_FULL), background_dir=str(tmp_path), paper_scale=(0.5, 0.6))
    page = renderer(config).draw(Random(1), split="train", heldout_percent=10)
    levels = np.asarray(Image.open(io.BytesIO(page.image))).reshape(-1, 3).astype(int)
    assert (np.abs(levels - (200, 30, 30)).max(axis=1) < 25).mean() > 0.4
    (tmp_path / "sub" / "red.png").unlink()
    with pytest.raises(ConfigError, match=r"ten unreadable pictures in a row, the last .*broken\.jpg"):
        renderer(config).draw(Random(1), split="train", heldout_percent=10)
    with pytest.raises(ConfigError, match="holds no picture"):
        renderer(dataclasses.replace(config, background_dir=str(tmp_path / "sub")))


def test_pages_show_the_words_of_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("alpha beta gamma\ndelta \u4e00 epsilon", encoding="utf-8")
    config = dataclasses.replace(clean(SMALL_FULL), corpus_en=str(tmp_path / "en.txt"))
    page = renderer(config).draw(Random(1), split="train", heldout_percent=10)
    words = " ".join(line.text for line in page.lines).split()
    assert set(words) <= {"alpha", "beta", "gamma", "delta", "epsilon"} and len(set(words)) > 3, (
        "and none without a shape"
    )
    for content, message in ((b"", "is empty"), (b"\xff", "cannot be read")):
        (tmp_path / "en.txt").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            renderer(config)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60), st.sampled_from(["en", "zh"]))
def test_a_corpus_is_read_on_from_a_random_place(seed: int, length: int, language: fonts_module.Language) -> None:
    corpus = Corpus("one two three four")
    text = corpus.paragraph(Random(seed), length, language)
    assert len(text) >= min(length, 18)
    repeated = " ".join([corpus.text] * 9) if language == "en" else corpus.text * 9
    assert text in repeated
    if language == "en":
        assert set(text.split()) <= set(corpus.text.split())


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
    lines = list(wrap(text, font, 180, language))
    assert len(lines) > 3
    assert all(font.getlength(line) <= 180 for line in lines)
    assert (" " if language == "en" else "").join(lines) == text


def test_a_line_is_drawn_as_large_as_its_box() -> None:
    for line in (LineBox("page", 0, 0, 56, 28), LineBox("page", 0, 0, 28, 112, vertical=True)):
        mask = draw_line(line)
        assert mask.size == (line.width, line.height)
        assert mask.getextrema()[1] > 200
    rows = np.asarray(mask).reshape(4, 28, 28).max(axis=(1, 2))
    assert (rows > 200).all(), "a letter to a square"


def test_the_key_tells_pages_apart_by_what_can_be_read() -> None:
    corners = ((0, 0), (84, 0), (84, 84), (0, 84))
    plan = PagePlan(84, 84, (LineBox("page", 0, 28, 56, 28),), corners, "en")
    moved = dataclasses.replace(plan, lines=(LineBox("page", 14, 28, 56, 28),))
    other_font = dataclasses.replace(plan, lines=(LineBox("page", 0, 28, 56, 28, Font("Other", Path("x.ttf"))),))
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
