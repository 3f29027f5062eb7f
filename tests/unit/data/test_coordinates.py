"""One rounding rule and its inverse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.coordinates import GRID, format_points, from_cell, parse_points, to_cell

CELLS = st.integers(0, GRID - 1)
FRACTIONS = st.floats(0, 1)


def test_every_cell_survives_the_round_trip() -> None:
    assert all(to_cell(from_cell(cell)) == cell for cell in range(GRID))


@settings(derandomize=True, max_examples=200)
@given(st.lists(FRACTIONS, min_size=4, max_size=4))
def test_coordinates_err_by_half_a_cell_at_most(box: list[float]) -> None:
    parsed = parse_points(format_points(box), 2)
    assert parsed is not None
    assert all(abs(a - b) <= 0.5 / GRID + 1e-12 for a, b in zip(box, parsed, strict=True))


@settings(derandomize=True, max_examples=100)
@given(st.lists(CELLS, min_size=8, max_size=8))
def test_text_survives_the_round_trip(cells: list[int]) -> None:
    text = ",".join(f"({x},{y})" for x, y in zip(cells[::2], cells[1::2], strict=True))
    parsed = parse_points(text, 4)
    assert parsed is not None
    assert format_points(parsed) == text


def test_outside_is_clipped_and_not_a_number_is_refused() -> None:
    assert (to_cell(-0.1), to_cell(1.0), to_cell(1.5)) == (0, 999, 999)
    with pytest.raises(ValueError, match="finite"):
        to_cell(float("nan"))


@pytest.mark.parametrize(
    "text", ["", "(1,2)", "(1,2),(3,4),(5,6)", "(1,2),(3,4000)", "(1,2)(3,4)", "x(1,2),(3,4)", "(-1,2),(3,4)"]
)
def test_anything_else_is_no_box(text: str) -> None:
    assert parse_points(text, 2) is None
