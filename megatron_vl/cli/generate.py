"""``tools/generate.py``: answer a file of questions with a checkpoint. It also runs under torchrun, at any layout.

Each line of the input is a JSON object with the fields key, task, image, prompt and reference. Only prompt is required.
image is a path relative to the file, or a list of paths. prompt is text, and may contain the tags <ref>, <box> and
<quad>. The output has the same questions in the same order, with the field prediction. If an image cannot be read, or a
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
from collections.abc import Sequence
from dataclasses import replace
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
from megatron_vl.evaluation.questions import Prediction, Question, read_questions, to_lines
from megatron_vl.generation.chat import MAX_WINDOW_SIZE, ChatEncoder, Dialogue, stop_sequences
from megatron_vl.log import log_rank_0, setup_logging, silence_dependency_warnings, write_line

if TYPE_CHECKING:
    from megatron_vl.generation.engine import Prompt


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
    questions = _read(options.inputs, options.chat_format)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.parallel.topology import Topology

    with Topology(parallel_config(options)) as topology:
        answers = _answers(questions, options, topology)
        if topology.rank == 0:
            write_whole(options.output, to_lines(answers))
            write_line(f"{options.output}: {_summary(answers)}")


def _summary(answers: Sequence[Prediction]) -> str:
    skipped = [f"{answer.name}, {answer.skipped}" for answer in answers if answer.skipped is not None]
    said = f"{len(answers) - len(skipped)} answers"
    return f"{said}; skipped {len(skipped)} of {len(answers)} questions: {'; '.join(skipped[:3])}" if skipped else said


def _answers(questions: Sequence[Question], options: argparse.Namespace, topology: Any) -> list[Prediction]:
    """Answer each question, the same on every rank."""
    from megatron_vl.generation.engine import Engine, GenerationOptions

    parallel = parallel_config(options)
    engine = Engine.from_checkpoint(options.checkpoint, parallel=parallel, topology=topology, bf16=options.bf16)
    tokenizer = QwenTokenizer(engine.model.num_bpe_tokens, options.vocab_file)
    prompts: list[Prompt] = []
    answers: list[Prediction] = []
    for question in questions:
        try:
            prompts.append(_prompt(question, tokenizer, engine.model, options))
            answers.append(Prediction(**vars(question)))
        except SkipSample as error:
            answers.append(Prediction(**vars(question), skipped=str(error)))
    limits = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        stop_sequences=stop_sequences(options.chat_format, tokenizer),
    )
    replies = iter(engine.generate(prompts, limits))
    return [
        replace(item, prediction=tokenizer.decode(next(replies)).strip()) if item.skipped is None else item
        for item in answers
    ]


def _read(path: Path, chat_format: str) -> tuple[Question, ...]:
    """Read the questions. The parts of a prompt are checked when it is assembled."""
    questions = read_questions(path)
    for item in questions if chat_format == "raw" else ():
        if item.history or item.system or not isinstance(item.prompt, str):
            raise DataError(f"{path}, {item.name}: 'history', 'system' and a list of parts need --chat-format chatml")
    return questions


def _prompt(question: Question, tokenizer: QwenTokenizer, model: ModelConfig, options: argparse.Namespace) -> Prompt:
    import numpy as np
    import torch

    from megatron_vl.data.images.pixels import blank_pixels
    from megatron_vl.generation.engine import Prompt

    paths = question.images
    if options.chat_format == "chatml":
        encoder = ChatEncoder(tokenizer, model.resampler.num_queries, options.max_window_size)
        tokens, paths = _chat(question, encoder)
    else:
        pieces = [Piece("image")] * len(paths) + parse_markup(question.text, images=False)
        tokens = tuple(encode_pieces(pieces, tokenizer, num_queries=model.resampler.num_queries).tokens.tolist())
    if not tokens:
        raise SkipSample("empty_prompt", "neither text nor an image")
    if not paths:
        return Prompt(tokens)
    if options.blank_images:
        return Prompt(tokens, torch.from_numpy(blank_pixels(len(paths), model.image_size)))
    pixels = [_pixels(question.file.parent / path, model.image_size) for path in paths]
    return Prompt(tokens, torch.from_numpy(np.stack(pixels)))


def _chat(question: Question, encoder: ChatEncoder) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens of a dialogue, and the paths of the images in it."""
    text = question.prompt
    parts = [*({"image": path} for path in question.images), *([{"text": text}] if isinstance(text, str) else text)]
    try:
        query = join_parts(parts, images_before=sum(count_images(earlier) for earlier, _ in question.history))
    except DataError as error:
        raise DataError(f"--inputs, {question.name}: {error}") from error
    system = DEFAULT_SYSTEM if question.system is None else question.system
    prompt = encoder.prompt(Dialogue(query, question.history, system))
    if prompt.left_out:
        log_rank_0(
            f"--inputs, {question.name}: the oldest {prompt.left_out} of {len(question.history)} exchanges do not fit "
            f"--max-window-size {encoder.max_window_size}",
        )
    return prompt.tokens, prompt.images


def _pixels(path: Path, image_size: int) -> Any:
    from megatron_vl.data.images.decode import to_pixels

    try:
        return to_pixels(path.read_bytes(), image_size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise SkipSample("missing_image", f"{path}: {error}") from error
    except SkipSample as error:
        raise SkipSample(error.reason, f"{path}: {error.detail}") from error
