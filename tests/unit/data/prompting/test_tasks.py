"""What the model reads for each task, to the character, and what of it is supervised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vl.data.prompting.tasks import Piece, render, render_prompt
from megatron_vl.data.prompting.tokenize import TokenizeOptions, tokenize_sample
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import ImageRef, Region, Sample
from megatron_vl.errors import SkipSample

IMAGE = ImageRef("image", b"")
BOX = (0.1, 0.2, 0.3, 0.9999)
BOX_TEXT = "<box>(100,200),(300,999)</box>"
QUAD = (0.1, 0.1, 0.5, 0.1, 0.5, 0.2, 0.1, 0.2)
QUAD_TEXT = "<quad>(100,100),(500,100),(500,200),(100,200)</quad>"
TINY = QwenTokenizer(256)


def sample(task: Any, **fields: Any) -> Sample:
    images = () if task in ("text", "chat") else (IMAGE,)
    return Sample(**{"key": "k", "source": "s", "task": task, "images": images, **fields})


def show(pieces: tuple[Piece, ...]) -> str:
    """The text with ▶ where supervision begins."""
    text, learned = "", False
    for piece in pieces:
        text += "▶" * (piece.supervised and not learned) + (piece.text or "[image]")
        learned = piece.supervised
    return text


GROUNDED = sample(
    "grounded_caption",
    text="Two apples near a red cup.",
    regions=(Region("a red cup", (BOX,), span=(16, 25)), Region("Two apples", (BOX, BOX), span=(0, 10))),
)
CASES = [
    (sample("caption", text="a dog"), "[image]Generate the caption in English:▶ a dog<|endoftext|>"),
    (sample("caption", text="一只狗", language="zh"), "[image]用中文描述图片：▶一只狗<|endoftext|>"),
    (sample("vqa", question="How many?", text="two"), "[image]How many? Answer:▶ two<|endoftext|>"),
    (sample("vqa", question="几只？", text="两只", language="zh"), "[image]几只？ 回答：▶两只<|endoftext|>"),
    (
        GROUNDED,
        "[image]Generate the caption in English with grounding:▶"
        f"<ref> Two apples</ref>{BOX_TEXT}{BOX_TEXT} near<ref> a red cup</ref>{BOX_TEXT}.<|endoftext|>",
    ),
    (
        sample("referring", question="the ear", regions=(Region("the ear", (BOX,)),)),
        f"[image]<ref>the ear</ref>▶{BOX_TEXT}<|endoftext|>",
    ),
    (
        sample("region_caption", text="yellow gloves", regions=(Region("", (BOX,)),)),
        f"[image]<ref>This</ref>{BOX_TEXT} is▶ yellow gloves<|endoftext|>",
    ),
    (
        sample("ocr", regions=(Region("It is", quads=(QUAD,)), Region("managed", quads=(QUAD,)))),
        f"[image]OCR with grounding:▶<ref> It is</ref>{QUAD_TEXT}<ref> managed</ref>{QUAD_TEXT}<|endoftext|>",
    ),
    (sample("text", text=" All of it.\n"), "▶ All of it.\n<|endoftext|>"),
]


@pytest.mark.parametrize(("given_sample", "expected"), CASES, ids=lambda case: getattr(case, "task", ""))
def test_rendered_text_and_supervision(given_sample: Sample, expected: str) -> None:
    pieces = render(given_sample)
    assert show(pieces) == expected
    assert pieces[: len(render_prompt(given_sample))] == render_prompt(given_sample)


def test_the_prompt_needs_no_answer() -> None:
    assert show(render_prompt(sample("vqa", question="How many?"))) == "[image]How many? Answer:"
    assert show(render_prompt(sample("referring", question="the ear"))) == "[image]<ref>the ear</ref>"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (sample("caption", text="  "), "empty_text"),
        (sample("caption", text="a", images=()), "no_image"),
        (sample("text", text="a", images=(IMAGE,)), "unexpected_image"),
        (sample("vqa", question="", text="a"), "empty_text"),
        (sample("referring", question="a"), "no_region"),
        (sample("referring", question="a", regions=(Region("a"),)), "no_region"),
        (sample("referring", question="a", regions=(Region("a", ((0.1, 0.2, 0.3),)),)), "bad_coordinates"),  # type: ignore[arg-type]
        (
            sample("referring", question="a", regions=(Region("a", ((0.1, 0.2, 0.3, float("nan")),)),)),
            "bad_coordinates",
        ),
        (replace(GROUNDED, text="Two"), "bad_span"),
        (replace(GROUNDED, regions=(*GROUNDED.regions, Region("red", (BOX,), span=(18, 21)))), "overlapping_regions"),
    ],
)
def test_a_sample_without_what_its_task_needs_is_skipped(broken: Sample, reason: str) -> None:
    with pytest.raises(SkipSample) as error:
        render(broken)
    assert error.value.reason == reason


def test_a_long_sample_is_skipped_and_a_long_document_is_not() -> None:
    options = TokenizeOptions(num_queries=4, max_length=20)
    with pytest.raises(SkipSample, match="too_long"):
        tokenize_sample(sample("caption", text="long " * 10), TINY, options)
    assert tokenize_sample(sample("text", text="long " * 10), TINY, options).length > 20
