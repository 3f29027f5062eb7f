"""Questions of a file as requests to the engine, and the engine's answers as predictions.

Both are iterators in the order of the file, so a file of any length takes the memory of a few batches. A question that
cannot be asked never reaches the engine: its place in the order is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.config.schema import ModelConfig
from megatron_vl.data.prompting.chat import DEFAULT_SYSTEM
from megatron_vl.data.prompting.markup import count_images, join_parts, parse_markup
from megatron_vl.data.prompting.tasks import Piece
from megatron_vl.data.prompting.tokenize import encode_pieces
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.evaluation.questions import Prediction, Question
from megatron_vl.generation.chat import MAX_WINDOW_SIZE, ChatEncoder, ChatFormat, Dialogue
from megatron_vl.log import log_rank_0

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megatron_vl.generation.requests import Answer, Request


@dataclass(frozen=True)
class QuestionEncoder:
    """How questions are presented to a model."""

    tokenizer: QwenTokenizer
    model: ModelConfig
    chat_format: ChatFormat = "raw"
    max_window_size: int = MAX_WINDOW_SIZE
    blank_images: bool = False
    """Replace every image by a gray one."""

    def request(self, question: Question) -> Request:
        """Return a question for the engine, numbered by its line. Its images are decoded when they are needed.

        Raises:
            SkipSample: ``empty_prompt``; and when the images are decoded, ``missing_image`` or why they cannot be used.
            DataError: if the parts of a prompt are wrong.
        """
        from megatron_vl.generation.requests import Request

        if self.chat_format == "chatml":
            tokens, images = self._chat(question)
        else:
            pieces = [Piece("image")] * len(question.images) + parse_markup(question.text, images=False)
            encoded = encode_pieces(pieces, self.tokenizer, num_queries=self.model.resampler.num_queries)
            tokens, images = tuple(encoded.tokens.tolist()), question.images
        if not tokens:
            raise SkipSample("empty_prompt", "neither text nor an image")
        paths = [question.file.parent / image for image in images]
        return Request(tokens, (lambda: self._pixels(paths)) if paths else None, question.line)

    def _chat(self, question: Question) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the tokens of a dialogue, and the paths of the images in it."""
        encoder = ChatEncoder(self.tokenizer, self.model.resampler.num_queries, self.max_window_size)
        system = DEFAULT_SYSTEM if question.system is None else question.system
        prompt = encoder.prompt(Dialogue(query_of(question), question.history, system))
        if prompt.left_out:
            log_rank_0(
                f"{question.file}, {question.name}: the oldest {prompt.left_out} of {len(question.history)} exchanges "
                f"do not fit a window of {self.max_window_size} tokens",
            )
        return prompt.tokens, prompt.images

    def _pixels(self, paths: list[Path]) -> Tensor:
        """Return uint8[k, 3, H, W]."""
        import numpy as np
        import torch

        from megatron_vl.data.images.pixels import blank_pixels

        if self.blank_images:
            return torch.from_numpy(blank_pixels(len(paths), self.model.image_size))
        return torch.from_numpy(np.stack([read_pixels(path, self.model.image_size) for path in paths]))


def check_question(question: Question, chat_format: ChatFormat) -> None:
    """Raise DataError, which names the line, if a question cannot be put in this form."""
    if chat_format == "chatml":
        query_of(question)
    elif question.history or question.system or not isinstance(question.prompt, str):
        raise DataError(
            f"{question.file}, {question.name}: 'history', 'system' and a list of parts need --chat-format chatml"
        )


def query_of(question: Question) -> str:
    """Return the last turn of a dialogue, with the images of the question as ``Picture k``.

    Raises:
        DataError: if the parts of the prompt are wrong; names the line.
    """
    text = question.prompt
    parts = [*({"image": path} for path in question.images), *([{"text": text}] if isinstance(text, str) else text)]
    try:
        return join_parts(parts, images_before=sum(count_images(earlier) for earlier, _ in question.history))
    except DataError as error:
        raise DataError(f"{question.file}, {question.name}: {error}") from error


def read_pixels(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Return uint8[3, H, W] of an image file. Raises SkipSample, which names the file."""
    from megatron_vl.data.images.decode import to_pixels

    try:
        return to_pixels(path.read_bytes(), image_size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise SkipSample("missing_image", f"{path}: {error}") from error
    except SkipSample as error:
        raise SkipSample(error.reason, f"{path}: {error.detail}") from error


def answer_questions(
    questions: Iterable[Question],
    encoder: QuestionEncoder,
    generate: Callable[[Iterable[Request]], Iterator[Answer]],
    text_of: Callable[[tuple[int, ...]], str],
) -> Iterator[Prediction]:
    """Yield the answer to each question in order, as they come.

    Args:
        questions: read only as far as the engine needs them.
        generate: yields an answer to each request, in order.
        text_of: the text of an answer's tokens.
    """
    waiting: deque[Prediction] = deque()
    """Questions whose answer has not come; those that were not asked have the reason."""

    def requests() -> Iterator[Request]:
        for question in questions:
            try:
                request = encoder.request(question)
            except SkipSample as error:
                waiting.append(Prediction(**vars(question), skipped=str(error)))
            else:
                waiting.append(Prediction(**vars(question)))
                yield request

    def not_asked() -> Iterator[Prediction]:
        while waiting and waiting[0].skipped is not None:
            yield waiting.popleft()

    for answer in generate(requests()):
        yield from not_asked()
        yield replace(waiting.popleft(), prediction=text_of(answer.tokens), skipped=answer.skipped)
    yield from not_asked()
