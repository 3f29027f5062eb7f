"""Prompts from the command line: ``--prompt``, once or repeated, and ``--interactive``.

In ChatML they are the turns of one dialogue, in which images are numbered Picture 1, Picture 2, ... In raw text each
prompt stands alone, with the images, since a base model has no turns.

With ``--draw`` the boxes and quads of the last reply are drawn onto the newest image. What cannot be read as a box is
reported and not drawn.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.cli.output import check_writable, whole_file
from megatron_vl.data.prompting.grounding import GroundedText, complete_reply, parse_grounding, without_swapped_boxes
from megatron_vl.data.prompting.markup import parse_markup
from megatron_vl.errors import ConfigError, DataError, MegatronVLError, SkipSample
from megatron_vl.evaluation.answering import QuestionEncoder, answer_questions, check_question, query_of
from megatron_vl.evaluation.questions import Question
from megatron_vl.launch import read_launch
from megatron_vl.log import log_rank_0, write_line

if TYPE_CHECKING:
    from megatron_vl.generation.requests import Answer, Request

    Generate = Callable[[Iterable[Request]], Iterator[Answer]]

_SOURCE = Path("--prompt")
"""Stands for the file of questions in messages. Paths of images count from the working directory."""
COMMANDS = "/image PATH adds an image to the next prompt, /draw PATH draws the last reply, /new begins anew, /end ends"


def check_conversation(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and images that are not there, before torch is imported.

    Raises:
        ConfigError: names the flags.
        DataError: names the image.
    """
    if options.interactive and (ranks := read_launch().world_size) > 1:
        raise ConfigError(f"--interactive: a dialogue at the terminal runs in one process; found {ranks} ranks")
    if options.draw is not None and not options.prompt:
        raise ConfigError("--draw: draws the reply to a --prompt; at the terminal, /draw PATH does")
    if options.draw is not None:
        _format_of(options.draw)
        check_writable(options.draw, flag="--draw")
    for image in options.image:
        if not image.is_file():
            raise DataError(f"--image {image}: no such file")
    for prompt in options.prompt:
        check_question(_first_question(options, prompt), options.chat_format)


def _first_question(options: argparse.Namespace, prompt: str) -> Question:
    images = tuple(map(str, options.image))
    return Question(prompt=prompt, images=images, system=options.system, file=_SOURCE, line=1)


@dataclass(frozen=True)
class Reply:
    """A reply, and what is needed to draw it."""

    text: str
    grounded: GroundedText
    image: Path | None
    """The newest image of the dialogue."""


@dataclass
class Conversation:
    """A dialogue so far; in raw text, the number of prompts so far."""

    encoder: QuestionEncoder
    generate: Generate
    text_of: Callable[[tuple[int, ...]], str]
    system: str | None = None
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: int = 0

    def ask(self, prompt: str, images: tuple[str, ...]) -> Reply:
        """Answer a prompt after the earlier ones.

        Raises:
            DataError: if an image cannot be used, or there is neither text nor an image.
        """
        chat = self.encoder.chat_format == "chatml"
        question = Question(
            prompt=prompt,
            images=images,
            system=self.system,
            history=tuple(self.history),
            file=_SOURCE,
            line=self.turns + 1,
        )
        (answer,) = answer_questions([question], self.encoder, self.generate, self.text_of)
        if answer.skipped is not None:
            raise DataError(f"{_SOURCE}, turn {question.line}: {answer.skipped}")
        self.turns += 1
        query = query_of(question) if chat else prompt
        if chat:
            self.history.append((query, answer.prediction))
        grounded = parse_grounding(complete_reply(prompt, answer.prediction))
        return Reply(answer.prediction, grounded, _newest_image([*(text for text, _ in self.history), query], images))


def _newest_image(queries: list[str], images: tuple[str, ...]) -> Path | None:
    named = [piece.text for text in queries for piece in parse_markup(text) if piece.kind == "image"]
    paths = named or list(images)
    return Path(paths[-1]) if paths else None


def converse(conversation: Conversation, options: argparse.Namespace, read: Callable[[], str | None]) -> None:
    """Answer the prompts of the flags, draw the last reply, and go on at the terminal if asked to.

    Args:
        read: the next line of the user, or None at the end.
    """
    images = tuple(map(str, options.image))
    chat = options.chat_format == "chatml"
    reply: Reply | None = None
    for number, prompt in enumerate(options.prompt):
        reply = conversation.ask(prompt, images if number == 0 or not chat else ())
        _show(reply)
    if options.draw is not None:
        draw_reply(reply, options.draw, options.font)
    if options.interactive:
        left = images if not options.prompt or not chat else ()
        _Terminal(conversation, options.font, left, reply).run(read)


@dataclass
class _Terminal:
    """A dialogue with a user who types."""

    conversation: Conversation
    font: Path | None
    images: tuple[str, ...]
    """Those of the next prompt."""
    reply: Reply | None

    def run(self, read: Callable[[], str | None]) -> None:
        log_rank_0(COMMANDS)
        while (line := read()) is not None and line.strip() != "/end":
            try:
                self._take(line)
            except MegatronVLError as error:  # the user can go on
                log_rank_0(str(error), level=logging.WARNING)

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/image":
            if not Path(rest).is_file():
                raise DataError(f"/image {rest}: no such file")
            self.images += (rest,)
        elif word == "/draw":
            draw_reply(self.reply, Path(rest), self.font)
        elif word == "/new":
            self.conversation.history.clear()
            self.images, self.reply = (), None
        elif word.startswith("/"):
            raise DataError(f"{word}: not known; {COMMANDS}")
        elif line.strip():
            self.reply = self.conversation.ask(line.strip(), self.images)
            self.images = () if self.conversation.encoder.chat_format == "chatml" else self.images
            _show(self.reply)


def _show(reply: Reply) -> None:
    if read_launch().rank == 0:
        write_line(reply.text)
    for problem in reply.grounded.broken:
        log_rank_0(f"not a box: {problem}", level=logging.WARNING)


def draw_reply(reply: Reply | None, path: Path, font: Path | None) -> None:
    """Draw the regions of a reply onto its image; rank 0 writes the file.

    Raises:
        DataError: if there is no image, or the file or the font cannot be used.
    """
    from megatron_vl.data.images.decode import decode_image
    from megatron_vl.generation.drawing import draw_labeled_regions

    if reply is None or reply.image is None:
        raise DataError(f"--draw {path}: the dialogue has no {'reply' if reply is None else 'image'} yet")
    if read_launch().rank != 0:
        return
    shapes = sum(len(region.boxes) + len(region.quads) for region in map(without_swapped_boxes, reply.grounded.regions))
    if not shapes:
        log_rank_0(f"--draw {path}: the reply has no box or quad, so nothing is written", level=logging.WARNING)
        return
    try:
        image = decode_image(reply.image.read_bytes())
    except (OSError, SkipSample) as error:
        raise DataError(f"{reply.image}: cannot be read ({error})") from error
    drawn = draw_labeled_regions(image, reply.grounded.regions, font)
    with whole_file(path, flag="--draw") as draft:
        drawn.save(draft, format=_format_of(path))
    log_rank_0(f"{path}: {shapes} shapes drawn onto {reply.image}")


def _format_of(path: Path) -> str:
    """Return Pillow's name of a format. Raises DataError for a suffix that names none."""
    name = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if name is None:
        raise DataError(f"--draw {path}: expected a name that ends in .png or .jpg")
    return name
