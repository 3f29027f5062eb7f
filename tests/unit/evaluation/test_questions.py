"""Questions: the prompts of training as text, the answers kept aside, images beside the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.cli.questions import main
from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.prepare.recipe import DataRecipe, SourceEntry
from megatron_vl.data.prompting.tokenize import TokenizeOptions, tokenize_sample
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import ImageRef, Region, Sample, Turn
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import DataError
from megatron_vl.evaluation.answering import QuestionEncoder
from megatron_vl.evaluation.asking import ask, make_questions
from megatron_vl.evaluation.questions import Prediction, Question, read_questions
from megatron_vl.evaluation.scoring import score_predictions
from tests.helpers.tiny import MODEL


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = (ImageRef("i", _jpeg()),)
QUAD = (0.1, 0.1, 0.5, 0.1, 0.5, 0.3, 0.1, 0.3)
SAMPLES = (
    Sample("c", "s", "caption", images=IMAGES, text="a red ball"),
    Sample("v", "s", "vqa", images=IMAGES, question="What color?", text="red", annotators=("red", "red", "pink")),
    Sample("r", "s", "referring", images=IMAGES, question="ball", regions=(Region("", ((0.1, 0.2, 0.3, 0.4),)),)),
    Sample("o", "s", "ocr", images=IMAGES, regions=(Region("oak", quads=(QUAD,)), Region("elm", quads=(QUAD,)))),
)


def test_a_dialogue_is_asked_by_its_first_exchange() -> None:
    def chat(*texts: str, images: tuple[ImageRef, ...] = IMAGES) -> Sample:
        turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
        return Sample("d", "s", "chat", images=images, turns=turns)

    question = ask(chat("Picture 1: <img>a.png</img>\nFind <ref>it</ref>.", "Here.", "And?", "No."))
    assert question is not None
    assert (question.prompt, question.references) == ("Find <ref>it</ref>.", ("Here.",))
    marked = ask(chat("Picture 1: <img>a<b.png</img>\n\nWhat?", "That."))
    assert marked is not None and marked.prompt == "\nWhat?"
    assert ask(chat("<img>a.png</img>What?", "That.")) is None, "generation would write Picture 1 before it"
    assert ask(chat("Hi", "Hello", images=())) is None
    assert ask(chat("Look: <img>a.png</img> What?", "That.")) is None
    assert ask(chat("Picture 1: <img>a</img>\n<img>b</img>What?", "That.", images=IMAGES * 2)) is None
    assert ask(chat("Hi", "Hello", "Picture 1: <img>a.png</img>\nWhat?", "That.")) is None
    assert ask(chat("Picture 1: <img>a.png</img>\nWhat?")) is None


@pytest.mark.parametrize("system", [None, "Answer in one word.", ""])
def test_a_dialogue_is_asked_under_the_system_turn_that_it_was_learned_with(tmp_path: Path, system: str | None) -> None:
    tokenizer = QwenTokenizer(2048)
    spoken = (Turn("user", "Picture 1: <img>a.jpg</img>\nWhat is it?"), Turn("assistant", "A ball."))
    turns = spoken if system is None else (Turn("system", system), *spoken)
    (asked,) = _write(tmp_path / "q.jsonl", Sample("d", "s", "chat", images=IMAGES, turns=turns))
    model = replace(MODEL, resampler=replace(MODEL.resampler, num_queries=16))
    tokens = QuestionEncoder(tokenizer, model, "chatml").request(asked).tokens
    learned = tokenize_sample(Sample("d", "s", "chat", images=IMAGES, turns=turns), tokenizer, TokenizeOptions(16, 512))
    assert list(tokens) == learned.tokens.tolist()[: len(tokens)]
    assert tokenizer.decode(learned.tokens[len(tokens) :].tolist()) == "A ball.<|im_end|>\n"


@dataclass(frozen=True)
class _Fixed(Source):
    samples: tuple[Sample | Skipped, ...] = ()

    def shards(self) -> list[Shard]:
        return [Shard("all", Path("all"))]

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        yield from self.samples


def _recipe(*samples: Sample | Skipped) -> DataRecipe:
    return DataRecipe((SourceEntry(_Fixed("s", samples)),), num_queries=16, num_bpe_tokens=2048)


def _write(path: Path, *samples: Sample | Skipped, limit: int = 10) -> tuple[Question, ...]:
    make_questions(_recipe(*samples), path, limit=limit)
    return read_questions(path)


def test_each_task_asks_as_in_training(tmp_path: Path) -> None:
    lines = _write(tmp_path / "q.jsonl", *SAMPLES)
    assert [line.prompt for line in lines] == [
        "Generate the caption in English:",
        "What color? Answer:",
        "<ref>ball</ref>",
        "OCR with grounding:",
    ]
    answers = [" a red ball", " red", "<box>(100,200),(300,400)</box>"]
    assert [line.references for line in lines[:3]] == [(answer,) for answer in answers]
    assert [line.annotators for line in lines] == [(), ("red", "red", "pink"), (), ()]
    assert (tmp_path / lines[0].images[0]).read_bytes() == IMAGES[0].data


def test_what_generation_would_read_otherwise_than_training_is_not_asked(tmp_path: Path) -> None:
    ball = Region("", ((0.1, 0.2, 0.3, 0.4),))
    words = (
        Sample("v", "s", "vqa", images=IMAGES, question="What is a <box>?", text="red"),
        Sample("r", "s", "referring", images=IMAGES, question="the </ref> ball", regions=(ball,)),
    )
    marks = Sample("m", "s", "region_caption", images=IMAGES, text="a ball", regions=(ball,))
    lines = _write(tmp_path / "q.jsonl", *words, marks, *SAMPLES)
    assert [line.key for line in lines] == ["s/m", *(f"s/{sample.key}" for sample in SAMPLES)]
    assert make_questions(_recipe(*words, marks), tmp_path / "q.jsonl", limit=9)[1] == {"markup_in_text": 2}


def test_the_reference_itself_scores_full_marks(tmp_path: Path) -> None:
    lines = [replace(line, annotators=()) for line in _write(tmp_path / "q.jsonl", *SAMPLES)]
    predictions = [Prediction(**vars(line), prediction=line.references[0]) for line in lines]
    assert {task: score.value for task, score in score_predictions(predictions).items()} == dict.fromkeys(
        ("caption", "vqa", "referring", "ocr"), 1.0
    )


def test_what_cannot_be_asked_is_left_out_and_the_limit_counts_questions(tmp_path: Path) -> None:
    text = Sample("t", "s", "text", text="once")
    lines = _write(tmp_path / "q.jsonl", text, Skipped("x", "no_image"), *SAMPLES, limit=2)
    assert [line.task for line in lines] == ["caption", "vqa"]
    assert ask(Sample("d", "s", "chat", turns=(Turn("user", "Hi"), Turn("assistant", "Hello")))) is None
    with pytest.raises(DataError, match="no question"):
        _write(tmp_path / "q.jsonl", text)


def test_what_has_no_question_is_counted_and_a_source_has_a_limit_of_its_own(tmp_path: Path) -> None:
    text = Sample("t", "s", "text", text="once")
    first = SourceEntry(_Fixed("a", (text, *SAMPLES)), limit=1)
    recipe = DataRecipe((first, SourceEntry(_Fixed("b", SAMPLES))), num_queries=16, num_bpe_tokens=2048)
    counts, left_out = make_questions(recipe, tmp_path / "q.jsonl", limit=3)
    assert counts == {"caption": 2, "vqa": 1, "referring": 1} and left_out == {"no_question": 1}


def test_a_limit_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe.yaml", "--output", "q.jsonl", "--limit", "-1"]) == 2
    assert "--limit -1: expected at least 1" in capsys.readouterr().err


def test_what_preparation_leaves_out_is_not_asked_and_counted(tmp_path: Path) -> None:
    def caption(text: str, image: ImageRef) -> Sample:
        return Sample("c", "s", "caption", images=(image,), text=text)

    samples = (
        Skipped("x", "missing_image"),
        caption("a cut image", ImageRef("cut", _jpeg()[:-20])),
        caption("no image", ImageRef("none", b"text")),
        caption("another size", replace(IMAGES[0], declared=(8, 9))),
        caption(" ", IMAGES[0]),
        caption("<PERSON> walks", IMAGES[0]),
        caption("a red ball", replace(IMAGES[0], declared=(8, 8))),
    )
    entry = SourceEntry(_Fixed("s", samples), filters=FilterOptions(drop_special_tags=True))
    recipe = DataRecipe((entry,), num_queries=16, num_bpe_tokens=2048)
    counts, left_out = make_questions(recipe, tmp_path / "q.jsonl", limit=9)
    assert counts == {"caption": 1}
    reasons = ("missing_image", "unreadable_image", "size_mismatch", "empty_text", "special_tag")
    assert left_out == dict(zip(reasons, (1, 2, 1, 1, 1), strict=True))
    broken = replace(recipe, sources=(replace(entry, source=_Fixed("s", samples[:3])),))
    with pytest.raises(DataError, match="no question; left out: 1 missing_image, 2 unreadable_image"):
        make_questions(broken, tmp_path / "q.jsonl", limit=9)
