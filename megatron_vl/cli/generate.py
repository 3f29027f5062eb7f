"""``tools/generate.py``: answer a file of questions with a checkpoint. It also runs under torchrun, at any layout.

Each line of the input is a JSON object with the fields key, task, image, prompt and reference. Only prompt is required.
image is a path relative to the file, or a list of paths. prompt is text, and may contain the tags <ref>, <box> and
<quad>. The output has the same lines in the same order, with the field prediction. If an image cannot be read, or a
question is empty, prediction is null and the field skipped holds the reason. The last line that is printed counts the
skipped questions.

With --chat-format raw, the model continues the text of the images and the prompt, as a base model does. With
--chat-format chatml, the prompt is a turn of a dialogue. A line may then have system, a text, and history, a list of
[query, reply]. A query may contain images as <img>PATH</img>. prompt may also be a list of {"image": path}, {"text":
words} and {"ref": phrase, "box": [[x1, y1, x2, y2]]}. Images are numbered Picture 1, Picture 2, ... through the
dialogue.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.inference_flags import add_inference_flags, check_layout, parallel_config
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.schema import ModelConfig
from megatron_vl.data.prompting.chat import DEFAULT_SYSTEM
from megatron_vl.data.prompting.markup import count_images, join_parts, parse_markup
from megatron_vl.data.prompting.tasks import Piece
from megatron_vl.data.prompting.tokenize import encode_pieces
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.generation.chat import MAX_WINDOW_SIZE, ChatEncoder, Dialogue, read_history, stop_sequences
from megatron_vl.log import log_rank_0, setup_logging, silence_dependency_warnings, write_line

if TYPE_CHECKING:
    from megatron_vl.generation.engine import Prompt

Json = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    silence_dependency_warnings()
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/generate.py",
        __doc__,
        example="python tools/generate.py --checkpoint runs/quickstart/model/stage2 --inputs "
        "runs/quickstart/eval/questions.jsonl --output runs/mine/answers.jsonl",
    )
    add_inference_flags(parser)
    parser.add_argument("--inputs", type=Path, required=True, help="questions, as JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--chat-format", choices=("raw", "chatml"), default="raw", help="how a question is presented to the model"
    )
    parser.add_argument(
        "--max-window-size",
        type=int,
        default=MAX_WINDOW_SIZE,
        metavar="N",
        help="tokens of the system text and the history of a dialogue; older exchanges are left out",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions answered together")
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a gray one")
    parser.add_argument("--vocab-file", help="Qwen's .tiktoken file (default: the one of the dashscope package)")
    return parser


def _run(options: argparse.Namespace) -> None:
    setup_logging()
    check_at_least("--max-new-tokens", options.max_new_tokens, 1)
    check_at_least("--batch-size", options.batch_size, 1)
    check_at_least("--max-window-size", options.max_window_size, 0)
    check_writable(options.output)
    check_layout(options)
    questions = read_questions(options.inputs, options.chat_format)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.parallel.topology import Topology

    with Topology(parallel_config(options)) as topology:
        answers = _answers(questions, options, topology)
        if topology.rank == 0:
            lines = [
                json.dumps({**question.asked, **answer}, ensure_ascii=False)
                for question, answer in zip(questions, answers, strict=True)
            ]
            write_whole(options.output, "\n".join(lines) + "\n")
            write_line(f"{options.output}: {_summary(questions, answers)}")


def _summary(questions: list[Question], answers: list[Json]) -> str:
    skipped = [f"{q.name}, {a['skipped']}" for q, a in zip(questions, answers, strict=True) if "skipped" in a]
    said = f"{len(answers) - len(skipped)} answers"
    return f"{said}; skipped {len(skipped)} of {len(answers)} questions: {'; '.join(skipped[:3])}" if skipped else said


def _answers(questions: list[Question], options: argparse.Namespace, topology: Any) -> list[Json]:
    """Return what is added to each question, the same on every rank."""
    from megatron_vl.generation.engine import Engine, GenerationOptions

    parallel = parallel_config(options)
    engine = Engine.from_checkpoint(options.checkpoint, parallel=parallel, topology=topology, bf16=options.bf16)
    tokenizer = QwenTokenizer(engine.model.num_bpe_tokens, options.vocab_file)
    prompts: list[Prompt] = []
    answers: list[Json] = []
    for question in questions:
        try:
            prompts.append(_prompt(question, tokenizer, engine.model, options))
            answers.append({"prediction": ""})
        except SkipSample as error:
            answers.append({"prediction": None, "skipped": str(error)})
    limits = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        stop_sequences=stop_sequences(options.chat_format, tokenizer),
    )
    answered = [answer for answer in answers if "skipped" not in answer]
    for answer, tokens in zip(answered, engine.generate(prompts, limits), strict=True):
        answer["prediction"] = tokenizer.decode(tokens).strip()
    return answers


@dataclass(frozen=True)
class Question:
    """A line of the file."""

    line: int
    content: Json

    @property
    def asked(self) -> Json:
        """The question without the fields of an earlier answer: this tool may have written the file."""
        return {key: value for key, value in self.content.items() if key not in ("prediction", "skipped")}

    @property
    def name(self) -> str:
        """The line number, and the key if there is one, for messages."""
        key = self.content.get("key")
        return f"line {self.line}" + ("" if key is None else f" ({key})")


def read_questions(path: Path, chat_format: str = "raw") -> list[Question]:
    """Read the lines of a file of questions; skip blank lines.

    Raises:
        DataError: if the file cannot be read, or a line is not a question; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--inputs {path}: cannot be read ({error}); expected JSON lines with a prompt") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        try:
            _check_question(question, chat_format)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}; found {line[:80]!r}") from error
        questions.append(Question(number, question))
    return questions


def _check_question(question: Any, chat_format: str) -> None:
    """Raise DataError for a line that is no question. The parts of a prompt are checked when it is assembled."""
    prompts = (str, list) if chat_format == "chatml" else str
    if not isinstance(question, dict) or not isinstance(question.get("prompt"), prompts):
        raise DataError("expected an object with a text 'prompt' (a list of parts needs --chat-format chatml)")
    images = question.get("image") or []
    if not isinstance(images, str) and not (isinstance(images, list) and all(isinstance(item, str) for item in images)):
        raise DataError("'image' should be a path or a list of them")
    if chat_format == "raw" and (question.get("history") or question.get("system")):
        raise DataError("'history' and 'system' need --chat-format chatml")
    if not isinstance(question.get("system") or "", str):
        raise DataError("'system' should be a text")
    read_history(question.get("history"))


def _prompt(question: Question, tokenizer: QwenTokenizer, model: ModelConfig, options: argparse.Namespace) -> Prompt:
    import numpy as np
    import torch

    from megatron_vl.data.images.pixels import blank_pixels
    from megatron_vl.generation.engine import Prompt

    images = question.content.get("image") or []
    paths = [images] if isinstance(images, str) else list(images)
    if options.chat_format == "chatml":
        encoder = ChatEncoder(tokenizer, model.resampler.num_queries, options.max_window_size)
        tokens, paths = _chat(question, paths, encoder)
    else:
        pieces = [Piece("image")] * len(paths) + parse_markup(question.content["prompt"], images=False)
        tokens = tuple(encode_pieces(pieces, tokenizer, num_queries=model.resampler.num_queries).tokens.tolist())
    if not tokens:
        raise SkipSample("empty_prompt", "neither text nor an image")
    if not paths:
        return Prompt(tokens)
    if options.blank_images:
        return Prompt(tokens, torch.from_numpy(blank_pixels(len(paths), model.image_size)))
    pixels = [_pixels(options.inputs.parent / path, model.image_size) for path in paths]
    return Prompt(tokens, torch.from_numpy(np.stack(pixels)))


def _chat(question: Question, paths: list[str], encoder: ChatEncoder) -> tuple[tuple[int, ...], list[str]]:
    """Return the tokens of a dialogue, and the paths of the images in it."""
    asked = question.content
    text, system, history = asked["prompt"], asked.get("system"), read_history(asked.get("history"))
    parts = [*({"image": path} for path in paths), *([{"text": text}] if isinstance(text, str) else text)]
    try:
        query = join_parts(parts, images_before=sum(count_images(earlier) for earlier, _ in history))
    except DataError as error:
        raise DataError(f"--inputs, {question.name}: {error}") from error
    prompt = encoder.prompt(Dialogue(query, history, DEFAULT_SYSTEM if system is None else system))
    if prompt.left_out:
        log_rank_0(
            f"--inputs, {question.name}: the oldest {prompt.left_out} of {len(history)} exchanges do not fit "
            f"--max-window-size {encoder.max_window_size}",
        )
    return prompt.tokens, list(prompt.images)


def _pixels(path: Path, image_size: int) -> Any:
    from megatron_vl.data.images.decode import to_pixels

    try:
        return to_pixels(path.read_bytes(), image_size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise SkipSample("missing_image", f"{path}: {error}") from error
    except SkipSample as error:
        raise SkipSample(error.reason, f"{path}: {error.detail}") from error
