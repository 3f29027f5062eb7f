"""Metrics against golden values: those of the public evaluation scripts, run once and written down here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.evaluation.metrics import answers
from megatron_vl.evaluation.metrics.answers import exact_match, normalize_answer, vqa_accuracy
from megatron_vl.evaluation.metrics.boxes import box_hit, box_iou
from megatron_vl.evaluation.metrics.texts import anls, caption_match


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The Cat.", "cat"),
        ("2:30 p.m.", "2:30 pm"),
        ("1,000", "1000"),
        ("10,000 people, maybe", "10000 people maybe"),
        ("red/blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("one-way", "1 way"),
        ("3.5", "3.5"),
        ("$5.00", "$5.00"),
        ("U.S.A.", "usa"),
        ("None", "0"),
        ("dont", "don't"),
        (". 5", "5"),
        ("a", ""),
        ("50%", "50%"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ill", "ill"),
        ("somebody'd", "somebodyd"),
        ("\ttwo\ndogs ", "2 dogs"),
    ],
)
def test_normalize_answer_golden(raw: str, normal: str) -> None:
    assert normalize_answer(raw) == normal


def test_contractions_never_touch_words_of_their_own() -> None:
    for word in ("ill", "id", "its", "well", "were", "wed", "shed", "shell", "hell", "lets"):
        assert word not in answers._CONTRACTIONS


def test_exact_match_takes_the_best_reference() -> None:
    assert exact_match("The red ball", ["cube", "red ball."]) == 1.0
    assert exact_match("blue ball", ["cube", "red ball"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("A", "A", 1.0),
        (" a.", "A", 1.0),
        ("(A)", "A", 1.0),
        ("", "A", 0.0),
        ("the", "A", 0.0),
        ("?", "A", 0.0),
        (">", "<", 0.0),
        ("<", "<", 1.0),
        ("", "-", 0.0),
    ],
)
def test_nothing_is_no_exact_match(prediction: str, reference: str, score: float) -> None:
    """AI2D asks for letters; VQA's normalization takes an A for an article, and leaves nothing of a sign."""
    assert exact_match(prediction, [reference]) == score


TEXTVQA_ANSWERS = ["nous les gosses", "dakota", "clos culombu", "dakota digital", "dakota", "dakota"] + [
    "dakota digital",
    "dakota digital",
    "dakota",
    "dakota",
]


@pytest.mark.parametrize(
    ("prediction", "score"), [("dakota", 1.0), ("dakota digital", 0.9), ("nous les gosses", 0.3), ("x", 0.0)]
)
def test_vqa_accuracy_golden(prediction: str, score: float) -> None:
    assert vqa_accuracy(prediction, TEXTVQA_ANSWERS) == pytest.approx(score)


@pytest.mark.parametrize(("num_matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_closed_form(num_matches: int, score: float) -> None:
    annotators = ["yes"] * num_matches + ["no"] * (10 - num_matches)
    assert vqa_accuracy("yes", annotators) == pytest.approx(score)


def test_vqa_accuracy_leaves_unanimous_answers_as_they_are() -> None:
    assert vqa_accuracy("two", ["two"] * 10) == 1.0
    assert vqa_accuracy("2", ["two"] * 10) == 0.0
    assert vqa_accuracy("two", ["two"] * 9 + ["2"]) == 1.0


def test_vqa_accuracy_needs_several_annotators() -> None:
    with pytest.raises(ValueError, match="two annotators"):
        vqa_accuracy("yes", ["yes"])


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("edward shannon", ["Edward R. Shannon", "Edward Shannon"], 1.0),
        ("12/05/99", ["12/5/99"], 0.875),
        ("abxx", ["abcd"], 0.5),
        ("abxxx", ["abcde"], 0.0),
        ("", [""], 1.0),
        ("", ["yes"], 0.0),
        ("STRASSE", ["straße"], 0.7142857),
        ("abxx    ", ["ab cd"], 0.625),
    ],
)
def test_anls_golden(prediction: str, references: list[str], score: float) -> None:
    assert anls(prediction, references) == pytest.approx(score)


def test_caption_match_ignores_case_spaces_and_the_full_stop() -> None:
    assert caption_match(" a red  Ball left of a blue cube.", ["A red ball left of a blue cube"]) == 1.0
    assert caption_match("a red ball", ["a red cube"]) == 0.0


def test_iou_golden() -> None:
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    truth = (103.93, 299.99, 238.15, 477.41)
    decoded = tuple(v * s / 999 for v, s in zip((162, 624, 372, 994), (640, 480, 640, 480), strict=True))
    assert box_iou(decoded, truth) == pytest.approx(0.9957, abs=5e-5)


def test_box_hit_counts_the_threshold_itself_and_no_box_as_a_miss() -> None:
    assert box_hit((0, 0, 1, 1), (0, 0, 1, 2)) == 1.0
    assert box_hit((0, 0, 1, 0.99), (0, 0, 1, 2)) == 0.0
    assert box_hit((1, 1, 0, 0), (0, 0, 1, 1)) == 0.0
    assert box_hit(None, (0, 0, 1, 1)) == 0.0


CELL = st.integers(0, 999)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(CELL, CELL, st.integers(1, 333), st.integers(1, 999))
def test_an_iou_of_one_half_is_a_hit(left: int, top: int, width: int, height: int) -> None:
    """A box and its right half, and two boxes that share half of what both cover; as texts, as models write them."""
    right, bottom = left + 2 * width, top + height
    whole, half = (left, top, right, bottom), (left + width, top, right, bottom)
    wide = 3 * width
    shifted = (left, top, left + wide, bottom), (left + width, top, left + width + wide, bottom)
    for first, second in ((whole, half), shifted):
        assert box_hit(first, second) == 1.0 == box_hit(second, first)
    assert box_hit((left + width + 1, top, right, bottom), whole) == 0.0, "a cell less is a miss"


UNIT = st.floats(0, 1, allow_nan=False)
BOXES = st.tuples(UNIT, UNIT, UNIT, UNIT)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(BOXES, BOXES)
def test_iou_is_symmetric_and_bounded(first: tuple, second: tuple) -> None:
    assert box_iou(first, second) == box_iou(second, first)
    assert 0.0 <= box_iou(first, second) <= 1.0


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_anls_is_bounded_and_one_on_equal_texts(first: str, second: str) -> None:
    assert 0.0 <= anls(first, [second]) <= 1.0
    assert anls(first, [first]) == 1.0
