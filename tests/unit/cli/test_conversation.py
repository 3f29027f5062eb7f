"""Prompts from the command line: turns, images, what is drawn and what is reported, with a stand-in for the model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.cli import conversation, generate
from megatron_vl.cli.conversation import Conversation, converse
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.evaluation.answering import QuestionEncoder
from megatron_vl.generation.chat import ChatFormat
from megatron_vl.generation.requests import Answer, Request
from tests.helpers.tiny import MODEL

TOKENIZER = QwenTokenizer(MODEL.num_bpe_tokens)
BOX = "<ref>it</ref><box>(100,100),(900,900)</box>"


class Model:
    """Gives the replies in turn, and keeps the prompts."""

    def __init__(self, *replies: str) -> None:
        self.replies = iter(replies)
        self.prompts: list[str] = []
        self.images: list[int] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        for request in requests:
            self.prompts.append(TOKENIZER.decode(request.tokens).replace("<imgpad>", ""))
            try:
                self.images.append(0 if request.pixels is None else len(request.pixels()))  # type: ignore[operator]
            except SkipSample as error:
                yield Answer(request.number, skipped=str(error))
                continue
            yield Answer(request.number, tuple(TOKENIZER.encode_with_specials(next(self.replies))))

    def conversation(self, chat_format: ChatFormat, system: str | None = None) -> Conversation:
        encoder = QuestionEncoder(TOKENIZER, MODEL, chat_format)
        return Conversation(encoder, self.generate, TOKENIZER.decode, system)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_vl"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 100), "white").save(tmp_path / name)
    return [str(tmp_path / name) for name in ("a.png", "b.png")]


def options(*arguments: str) -> argparse.Namespace:
    return generate._build_parser().parse_args(["--checkpoint", "c", *arguments])


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_prompts_in_chatml_are_one_dialogue(images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("A cat.", "Red.")
    flags = options("--prompt", "What?", "--prompt", "Its color?", "--image", images[0], "--image", images[1])
    flags.chat_format = "chatml"
    converse(model.conversation("chatml", "Be brief."), flags, lambda: None)
    first = turn("system", "Be brief.") + turn("user", "Picture 1: <img></img>\nPicture 2: <img></img>\nWhat?")
    opened = "<|im_start|>assistant\n"
    assert model.prompts[0] == first + opened
    assert model.prompts[1] == first + turn("assistant", "A cat.") + turn("user", "Its color?") + opened
    assert model.images == [2, 2] and capsys.readouterr().out == "A cat.\nRed.\n"


def test_prompts_in_raw_text_stand_alone(images: list[str]) -> None:
    model = Model("one", "two")
    flags = options("--prompt", "A:", "--prompt", "B:", "--image", images[0])
    converse(model.conversation("raw"), flags, lambda: None)
    assert model.prompts == ["<img></img>A:", "<img></img>B:"] and model.images == [1, 1]


def test_the_boxes_of_the_reply_are_drawn_onto_the_newest_image(images: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (40, 80), "white").save(images[1])
    model = Model("(100,100),(900,900)</box> and <box>(1,2)</box>")
    target = tmp_path / "out.png"
    flags = options("--prompt", "<ref>it</ref><box>", "--image", images[0], "--image", images[1], "--draw", str(target))
    converse(model.conversation("raw"), flags, lambda: None)
    with Image.open(target) as image:
        assert image.size == (40, 80) and image.getpixel((36, 40)) != (255, 255, 255)


def test_what_is_no_box_is_reported_and_not_drawn(
    images: list[str], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out.png"
    flags = options("--prompt", "Where?", "--image", images[0], "--draw", str(target))
    converse(Model("<box>(1,2),(3</box>").conversation("raw"), flags, lambda: None)
    assert "not a box: <box>(1,2),(3</box>: expected two points" in log.text
    assert "the reply has no box or quad, so nothing is written" in log.text and not target.exists()


def test_a_dialogue_at_the_terminal(images: list[str], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "out.jpg"
    lines = iter(
        ["/draw x.png", f"/image {images[0]}", "/image absent.png", "/what", "", "First", f"/draw {target}"]
        + [f"/image {images[1]}", "Second", "/new", "Third", "/end", "never"]
    )
    model = Model(BOX, "two", "three")
    converse(model.conversation("chatml"), _terminal(), lambda: next(lines))
    assert model.images == [1, 2, 0]
    assert "Picture 1: <img></img>\nFirst" in model.prompts[0] and "Picture 2: <img></img>\nSecond" in model.prompts[1]
    assert "First" not in model.prompts[2] and "Picture" not in model.prompts[2]
    assert Image.open(target).format == "JPEG"
    for said in ("has no reply yet", "/image absent.png: no such file", "/what: not known; /image PATH"):
        assert said in log.text
    assert next(lines) == "never"


def _terminal() -> argparse.Namespace:
    flags = options("--interactive")
    flags.chat_format = "chatml"
    return flags


def test_an_image_that_cannot_be_used_ends_the_turn(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"--prompt, turn 1: unreadable_image: .*bad\.png"):
        Model("a").conversation("raw").ask("What?", (str(tmp_path / "bad.png"),))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "found neither"),
        ("--inputs i --output o --prompt p", "found both"),
        ("--inputs i", "--inputs and --output belong together"),
        ("--output o --prompt p", "--inputs and --output belong together"),
        ("--inputs i --output o --image a", "--image belongs to --prompt and --interactive"),
        ("--inputs i --output o --draw a", "--draw belongs to --prompt and --interactive"),
        ("--prompt p --image absent.png", "--image absent.png: no such file"),
        ("--interactive --draw a.png", "--draw: draws the reply to a --prompt"),
        ("--prompt p --draw a.gif", "--draw a.gif: expected a name that ends in .png or .jpg"),
        ("--prompt p --system s", "--prompt, line 1: 'history', 'system'"),
        ("--prompt p --stop=", "--stop: the text is empty"),
        ("--prompt p --top-p 0.5", "top_p 0.5 has no effect at temperature 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--checkpoint", "c", *flags.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_terminal_has_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launch = conversation.read_launch()
    monkeypatch.setattr(conversation, "read_launch", lambda: argparse.Namespace(**{**vars(launch), "world_size": 2}))
    assert generate.main(["--checkpoint", "c", "--interactive"]) == 2
    assert "--interactive: a dialogue at the terminal runs in one process; found 2 ranks" in capsys.readouterr().err
