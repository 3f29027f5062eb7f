"""Drawing: shapes lie at the published pixels, each region has a color, and labels stay inside the image."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from megatron_vl.data.prompting.grounding import parse_grounding
from megatron_vl.errors import DataError
from megatron_vl.generation.drawing import draw_labeled_regions

WHITE = (255, 255, 255)


def drawn(text: str, size: tuple[int, int] = (200, 100)) -> Image.Image:
    return draw_labeled_regions(Image.new("RGB", size, "white"), parse_grounding(text).regions)


def changed(image: Image.Image) -> tuple[int, int, int, int] | None:
    """What is not white: left, top, right, bottom."""
    return ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()


def test_a_box_without_a_phrase_is_its_outline_alone() -> None:
    image = drawn("<box>(100,200),(500,800)</box>")
    left, top, right, bottom = changed(image) or (0, 0, 0, 0)
    assert abs(left - 20) <= 1 and abs(top - 20) <= 1 and abs(right - 101) <= 1 and abs(bottom - 81) <= 1
    assert image.getpixel((60, 50)) == WHITE and image.getpixel((60, 20)) != WHITE


def test_a_quad_is_drawn_with_its_four_sides() -> None:
    image = drawn("<quad>(100,100),(500,100),(700,900),(300,900)</quad>")
    for between in ((60, 10), (120, 50), (100, 90), (40, 50)):
        assert image.getpixel(between) != WHITE
    assert image.getpixel((80, 50)) == WHITE


def test_shapes_of_one_phrase_have_one_color_and_those_of_another_another() -> None:
    text = "<ref>a</ref><box>(50,400),(200,900)</box><box>(300,400),(450,900)</box>"
    image = drawn(f"{text}<ref>b</ref><box>(600,400),(750,900)</box>")
    first, second, third = (image.getpixel((x, 70)) for x in (10, 60, 120))
    assert first == second != third and WHITE not in (first, third)


def test_a_label_is_above_its_shape_and_inside_the_image() -> None:
    text = "<ref>cat</ref><box>(100,600),(500,900)</box>"
    assert (changed(drawn(text)) or ())[1] < 60 - 10
    for corner in ("(0,0),(10,10)", "(900,0),(999,10)"):
        bare, labeled = drawn(f"<box>{corner}</box>"), drawn(f"<ref>a long phrase</ref><box>{corner}</box>")
        box = changed(labeled) or (0, 0, 0, 0)
        assert box[2] - box[0] > 60, "the whole label is there"
        assert changed(bare) != box


def test_swapped_corners_are_not_drawn() -> None:
    assert changed(drawn("<ref>a</ref><box>(500,500),(100,100)</box>")) is None


def test_what_is_no_font_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.ttf").write_text("no font")
    with pytest.raises(DataError, match=r"--font .*f\.ttf: cannot be read as a TrueType font"):
        draw_labeled_regions(Image.new("RGB", (9, 9)), [], tmp_path / "f.ttf")
