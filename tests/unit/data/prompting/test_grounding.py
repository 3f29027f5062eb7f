"""Grounding text: what is parsed, what is dropped, what is drawn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vl.data.prompting.grounding import complete_reply, first_box, parse_grounding, without_swapped_boxes
from megatron_vl.data.sample import Region
from megatron_vl.generation.drawing import draw_regions

WHOLE = (0.0005, 0.0005, 0.9995, 0.9995)


def test_caption_with_grounding_gives_text_phrases_and_spans() -> None:
    text = (
        "<ref> Woman</ref><box>(0,0),(999,999)</box> and<ref> her dog</ref><box>(0,333),(333,666)</box>"
        "<box>(1,2),(3,4)</box> on the beach"
    )
    parsed = parse_grounding(text)
    assert parsed.text == " Woman and her dog on the beach"
    woman, dog = parsed.regions
    assert woman.boxes == ((0.0005, 0.0005, 0.9995, 0.9995),)
    assert dog.boxes == ((0.0005, 0.3335, 0.3335, 0.6665), (0.0015, 0.0025, 0.0035, 0.0045))
    assert parsed.phrases == ("Woman", "her dog")
    assert dog.span is not None
    assert parsed.text[slice(*dog.span)] == dog.text == "her dog"


def test_quads_are_read_and_swapped_corners_are_kept() -> None:
    parsed = parse_grounding("<ref>EXIT</ref><quad>(0,0),(999,0),(999,999),(0,999)</quad>")
    quad = (0.0005, 0.0005, 0.9995, 0.0005, 0.9995, 0.9995, 0.0005, 0.9995)
    assert parsed.regions == (Region("EXIT", quads=(quad,), span=(0, 4)),)
    assert parse_grounding("<box>(999,999),(0,0)</box>").regions[0].boxes == ((0.9995, 0.9995, 0.0005, 0.0005),)


def test_a_box_belongs_to_the_phrase_just_before_it_only() -> None:
    parsed = parse_grounding("<ref>a cup</ref> stands here <box>(0,0),(999,999)</box>")
    assert parsed.regions == (Region("", boxes=(WHOLE,)),)


def test_unreadable_boxes_are_dropped_and_their_phrase_keeps_the_others() -> None:
    unreadable = "<box>(1,2),(3</box><box>(0,0),(5000,999)</box>"
    parsed = parse_grounding(f"<ref>cup</ref>{unreadable}<box>(0,0),(999,999)</box></box>!<ref>jar</ref>{unreadable}")
    assert parsed.text == "cup!jar"
    assert parsed.regions == (Region("cup", boxes=(WHOLE,), span=(0, 3)),)
    assert parsed.phrases == ("cup", "jar")


def test_first_box_reads_tagged_bare_and_unfinished_text() -> None:
    assert first_box("<ref>cup</ref><box>(0,0),(999,333)</box><box>(1,1),(2,2)</box>") == (
        0.0005,
        0.0005,
        0.9995,
        0.3335,
    )
    assert first_box("(0,0),(999,999)</box>") == WHOLE
    assert first_box("<box>(0,0),(999") is None
    assert first_box("(0,0)") is None


PIECES = st.sampled_from(["<ref>", "</ref>", "<box>", "</box>", "<quad>", "(1,2)", ",", "(9", "cup ", "\n"])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(PIECES))
def test_parsing_never_fails_and_leaves_no_markup(pieces: list[str]) -> None:
    parsed = parse_grounding("".join(pieces))
    assert not any(tag in parsed.text for tag in ("<ref>", "</ref>", "<box>", "</box>", "<quad>"))
    assert all(region.boxes or region.quads for region in parsed.regions)


def test_drawing_marks_the_outline_and_leaves_the_original_alone() -> None:
    image = Image.new("RGB", (100, 100), "white")
    drawn = draw_regions(image, [Region("cup", boxes=((0.2, 0.4, 0.8, 0.9),))], "#ff0000")
    assert drawn.getpixel((50, 40)) == (255, 0, 0)
    assert drawn.getpixel((50, 65)) == (255, 255, 255)
    assert image.getpixel((50, 40)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("<ref>a</ref><box>(1,2),(3,4)</box><quad>(1,2),(3,4),(5,6),(7,8)</quad>", []),
        ("<box>(1,2),(3</box>", ["<box>(1,2),(3</box>: expected two points"]),
        ("<box>(1,2),(1000,4)</box>", ["expected two points (x,y) of integers from 0 to 999"]),
        ("<quad>(1,2),(3,4)</quad>", ["<quad>(1,2),(3,4)</quad>: expected four points"]),
        ("<box>(5,2),(3,4)</box> <box>(1,4),(3,2)</box>", ["<box>(5,2),(3,4)</box>: its second", "<box>(1,4),(3,2)"]),
        ("<box>(5,2),(5,2)</box>", []),
        ("<ref>a</ref><box>(1,2),(3,", ["<box> without its partner, near '<box>(1,2),(3,'"]),
        ("a</ref> and <ref>b<box></ref>", ["</ref> without its partner", "<box> without its partner"]),
    ],
)
def test_broken_markup_is_reported(text: str, broken: list[str]) -> None:
    found = parse_grounding(text).broken
    assert len(found) == len(broken) and all(part in said for part, said in zip(broken, found, strict=True)), found


def test_a_reply_gets_the_tags_that_its_prompt_left_open() -> None:
    reply = "(1,2),(3,4)</box>"
    assert complete_reply("Find <ref>it</ref><box>", reply) == "<ref>it</ref><box>(1,2),(3,4)</box>"
    assert complete_reply("<ref>a</ref><box>(1,1),(2,2)</box> <quad>", "(1") == " <quad>(1"
    assert complete_reply("<ref>it</ref><box>(1,1),(2,2)</box>", reply) == reply == complete_reply("", reply)


def test_swapped_boxes_can_be_left_out() -> None:
    good = (0.1, 0.2, 0.3, 0.4)
    region = Region("a", boxes=((0.3, 0.2, 0.1, 0.4), good, (0.1, 0.4, 0.3, 0.2)), quads=((0.9, 0.9) * 4,))
    assert without_swapped_boxes(region) == Region("a", boxes=(good,), quads=region.quads)
