"""One rounding rule and its inverse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.prompting.coordinates import (
    GRID,
    cells_to_pixels,
    format_points,
    from_cell,
    parse_points,
    to_cell,
)
from megatron_vl.data.sources.boxes import box_from_corners, box_from_xywh
from megatron_vl.errors import SkipSample

CELLS = st.integers(0, GRID - 1)
FRACTIONS = st.floats(0, 1)


def test_every_cell_survives_the_round_trip() -> None:
    assert all(to_cell(from_cell(cell)) == cell for cell in range(GRID))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(FRACTIONS, min_size=4, max_size=4))
def test_coordinates_err_by_half_a_cell_at_most(box: list[float]) -> None:
    parsed = parse_points(format_points(box), 2)
    assert parsed is not None
    assert all(abs(a - b) <= 0.5 / GRID + 1e-12 for a, b in zip(box, parsed, strict=True))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(CELLS, min_size=8, max_size=8))
def test_text_survives_the_round_trip(cells: list[int]) -> None:
    text = ",".join(f"({x},{y})" for x, y in zip(cells[::2], cells[1::2], strict=True))
    parsed = parse_points(text, 4)
    assert parsed is not None
    assert format_points(parsed) == text


def test_a_mirrored_cell_is_a_cell() -> None:
    assert all(to_cell(1 - from_cell(cell)) == GRID - 1 - cell for cell in range(GRID))


BOTH_SIDES = st.tuples(*[st.integers(1, 4000)] * 4)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(x=st.floats(-100, 4000), y=st.floats(-100, 4000), w=st.floats(0, 4000), h=st.floats(0, 4000), image=BOTH_SIDES)
def test_a_box_survives_flips_and_resizes_to_half_a_cell(
    x: float, y: float, w: float, h: float, image: tuple[int, int, int, int]
) -> None:
    """A published box -> text -> box is at most half a thousandth off, also of the mirrored or resized image."""
    width, height, new_width, new_height = image
    try:
        box = box_from_xywh((x, y, w, h), width, height)
    except SkipSample as error:
        assert error.reason == "bad_box"
        return
    resized = box_from_corners(
        [value * side for value, side in zip(box, (new_width, new_height) * 2, strict=True)], new_width, new_height
    )
    mirrored = (1 - box[2], box[1], 1 - box[0], box[3])
    for kept, wanted in ((box, box), (resized, box), (mirrored, mirrored)):
        assert 0 <= kept[0] < kept[2] <= 1 and 0 <= kept[1] < kept[3] <= 1
        parsed = parse_points(format_points(kept), 2)
        assert parsed is not None and parsed[0] <= parsed[2] and parsed[1] <= parsed[3]
        assert max(abs(a - b) for a, b in zip(parsed, wanted, strict=True)) <= 0.5 / GRID + 1e-9
    parsed = parse_points(format_points(box), 2)
    assert parsed is not None
    back = parse_points(format_points((1 - parsed[2], parsed[1], 1 - parsed[0], parsed[3])), 2)
    assert back is not None and max(abs(a - b) for a, b in zip(back, mirrored, strict=True)) <= 0.5 / GRID + 1e-9


def test_outside_is_clipped_and_not_a_number_is_refused() -> None:
    assert (to_cell(-0.1), to_cell(1.0), to_cell(1.5)) == (0, 999, 999)
    with pytest.raises(ValueError, match="finite"):
        to_cell(float("nan"))


@pytest.mark.parametrize(
    "text", ["", "(1,2)", "(1,2),(3,4),(5,6)", "(1,2),(3,4000)", "(1,2)(3,4)", "x(1,2),(3,4)", "(-1,2),(3,4)"]
)
def test_anything_else_is_no_box(text: str) -> None:
    assert parse_points(text, 2) is None


@pytest.mark.parametrize(
    ("cells", "drawing", "evaluation"),
    [
        ((0, 0, 999, 999), (0, 0, 639, 479), (0.0, 0.0, 640.0, 480.0)),  # 999 * 640 / 1000 = 639.36
        ((500, 250, 501, 333), (320, 120, 320, 159), (500 * 640 / 999, 250 * 480 / 999, 501 * 640 / 999, 160.0)),
    ],
)
def test_the_two_published_scales(
    cells: tuple[int, ...], drawing: tuple[int, ...], evaluation: tuple[float, ...]
) -> None:
    assert cells_to_pixels(cells, (640, 480), "drawing") == drawing
    assert cells_to_pixels(cells, (640, 480), "evaluation") == pytest.approx(evaluation, abs=1e-9)


def test_drawing_cuts_as_the_published_code() -> None:
    """It computes ``int(x * w / 1000)`` in floating point."""
    for side in (1, 7, 333, 448, 640, 1999, 4096):
        found = [cells_to_pixels((cell, cell), (side, side), "drawing")[0] for cell in range(1000)]
        assert found == [int(cell * side / 1000) for cell in range(1000)]
