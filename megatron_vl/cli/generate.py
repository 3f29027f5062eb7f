"""``tools/generate.py``: answer questions with a checkpoint. It also runs under torchrun, at any layout.

Questions are in a file (--inputs, --output), or given by --prompt and --image, or typed (--interactive). In ChatML,
repeated prompts are the turns of one dialogue. --draw writes the image with the boxes and quads of the reply.

Each line of --inputs is a JSON object with the fields key, task, image, prompt and reference. Only prompt is required.
image is a path relative to the file, or a list of paths. prompt is text, and may contain the tags <ref>, <box> and
<quad>. The output has the same questions in the same order, with the field prediction. If an image cannot be read, or a
question is empty, prediction is null and the field skipped holds the reason. The last line that is printed counts the
skipped questions.

The file may have any length: questions are read, images decoded and answers written as they come, to OUTPUT.part until
the last one. After a kill, the same command continues there. Another checkpoint, question file or setting is refused.

With --chat-format raw, the model continues the text of the images and the prompt, as a base model does. With
--chat-format chatml, the prompt is a turn of a dialogue. A line may then have system, a text, and history, a list of
[query, reply]. A query may contain images as <img>PATH</img>. prompt may also be a list of {"image": path}, {"text":
words} and {"ref": phrase, "box": [[x1, y1, x2, y2]]}. Images are numbered Picture 1, Picture 2, ... through the
dialogue.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint import store
from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.conversation import Conversation, check_conversation, converse
from megatron_vl.cli.inference_flags import add_inference_flags, check_layout, parallel_config
from megatron_vl.cli.output import check_writable
from megatron_vl.cli.parser import CommandParser
from megatron_vl.cli.sampling_flags import add_sampling_flags, generation_options, sampling_of
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import ConfigError
from megatron_vl.evaluation.answer_file import AnswerFile, Tally
from megatron_vl.evaluation.answering import QuestionEncoder, answer_questions, check_question
from megatron_vl.evaluation.questions import Prediction, iterate_questions
from megatron_vl.files import sha256_of_file
from megatron_vl.generation.chat import MAX_WINDOW_SIZE, stop_sequences
from megatron_vl.generation.requests import Answer, Request
from megatron_vl.generation.stops import StopTexts
from megatron_vl.launch import read_launch
from megatron_vl.log import setup_logging, silence_dependency_warnings, write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    silence_dependency_warnings()
    return exit_status(
        lambda: _run(_build_parser().parse_args(argv)), if_interrupted="interrupted; the same command continues"
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/generate.py",
        __doc__,
        example="python tools/generate.py --checkpoint runs/quickstart/model/stage2 --inputs "
        "runs/quickstart/eval/questions.jsonl --output runs/mine/answers.jsonl",
    )
    add_inference_flags(parser)
    files = parser.add_argument_group("questions in a file")
    files.add_argument("--inputs", type=Path, help="questions, as JSON lines")
    files.add_argument("--output", type=Path, help="file to write")
    files.add_argument("--restart", action="store_true", help="drop what a run that was stopped has left")
    files.add_argument("--no-progress", action="store_true", help="show no progress bar")
    prompts = parser.add_argument_group("questions from the command line")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="question; may be repeated")
    prompts.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="may be repeated")
    prompts.add_argument("--system", metavar="TEXT", help="system turn, in ChatML")
    prompts.add_argument("--interactive", action="store_true", help="ask at the terminal")
    prompts.add_argument("--draw", type=Path, metavar="FILE", help="write the image with the boxes of the last reply")
    prompts.add_argument("--font", type=Path, metavar="FILE", help="TrueType font of labels (default: Latin letters)")
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
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a gray one")
    parser.add_argument("--vocab-file", help="Qwen's .tiktoken file (default: the one of the dashscope package)")
    add_sampling_flags(parser)
    return parser


def _run(options: argparse.Namespace) -> None:
    setup_logging()
    sampling_of(options)
    check_at_least("--max-window-size", options.max_window_size, 0)
    _check_mode(options)
    if options.inputs is None:
        check_conversation(options)
        check_layout(options)
        _converse(options)
        return
    check_writable(options.output)
    check_layout(options)
    if read_launch().rank != 0:
        _compute(options, None)
        return
    with _writer(options) as writer:
        _compute(options, writer)
    write_line(f"{options.output}: {writer.tally.summary}")


def _check_mode(options: argparse.Namespace) -> None:
    """Raise ConfigError unless the flags say where questions come from, once."""
    asked = bool(options.prompt) or options.interactive
    if (options.inputs is None) != (options.output is None):
        raise ConfigError("--inputs and --output belong together: questions, and the file for the answers")
    if (options.inputs is None) != asked:
        found = "both" if asked else "neither"
        raise ConfigError(f"questions are in --inputs FILE, or given by --prompt TEXT or --interactive; found {found}")
    for flag in ("image", "draw", "font", "system"):
        if options.inputs is not None and getattr(options, flag):
            raise ConfigError(f"--{flag} belongs to --prompt and --interactive, not to --inputs")


@contextmanager
def _writer(options: argparse.Namespace) -> Iterator[_Writer]:
    """Open the output for the block, which answers what is left; then the output is whole."""
    number = _check_questions(options)
    options.checkpoint = store.choose(options.checkpoint)
    output = AnswerFile(options.output, _settings(options), options.restart)
    with output.locked():
        tally = output.resume(iterate_questions(options.inputs))
        yield _Writer(output, tally, number, progress=not options.no_progress)
        output.finish()


def _check_questions(options: argparse.Namespace) -> int:
    """Return the number of questions. Raises DataError, which names the line, if one is wrong."""
    number = 0
    for question in iterate_questions(options.inputs):
        check_question(question, options.chat_format)
        number += 1
    return number


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the answers."""
    return {
        "questions": f"SHA-256 {sha256_of_file(options.inputs)}",
        "checkpoint": f"SHA-256 {sha256_of_file(options.checkpoint / store.MANIFEST)}",
        **asdict(sampling_of(options)),
        **{
            name: getattr(options, name)
            for name in ("max_new_tokens", "stop", "chat_format", "max_window_size", "blank_images", "bf16")
        },
    }


class _Writer:
    """Writes on rank 0, with a progress bar where standard error is a terminal."""

    def __init__(self, output: AnswerFile, tally: Tally, number: int, *, progress: bool) -> None:
        self._output, self.tally = output, tally
        self._number, self._progress = number, progress

    def write(self, predictions: Iterator[Prediction]) -> None:
        from tqdm import tqdm

        silent = None if self._progress else True
        first = self.tally.lines
        with tqdm(total=self._number, initial=first, unit="question", disable=silent, dynamic_ncols=True) as bar:
            self._output.append(predictions, self.tally, bar.update)


def _compute(options: argparse.Namespace, writer: _Writer | None) -> None:
    """Answer the questions that have no answer yet, on all ranks; rank 0 writes."""
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.parallel.topology import Topology

    with Topology(parallel_config(options)) as topology:
        _write_answers(options, topology, writer)


def _write_answers(options: argparse.Namespace, topology: Any, writer: _Writer | None) -> None:
    from megatron_vl.parallel.agreement import by_rank_0

    done = by_rank_0(lambda: 0 if writer is None else writer.tally.lines)
    predictions = _answers(options, topology, done)
    if writer is not None:
        writer.write(predictions)
    else:
        for _ in predictions:
            pass


def _answers(options: argparse.Namespace, topology: Any, done: int) -> Iterator[Prediction]:
    """Yield the answer to each question after the first ``done``, the same on every rank."""
    questions = islice(iterate_questions(options.inputs), done, None)
    return answer_questions(questions, *_load(options, topology))


def _load(
    options: argparse.Namespace, topology: Any
) -> tuple[QuestionEncoder, Callable[[Iterable[Request]], Iterator[Answer]], Callable[[tuple[int, ...]], str]]:
    """Load the model; return what encodes questions, what answers them, and what reads the answers."""
    from megatron_vl.generation.engine import Engine

    parallel = parallel_config(options)
    engine = Engine.from_checkpoint(options.checkpoint, parallel=parallel, topology=topology, bf16=options.bf16)
    tokenizer = QwenTokenizer(engine.model.num_bpe_tokens, options.vocab_file)
    encoder = QuestionEncoder(
        tokenizer, engine.model, options.chat_format, options.max_window_size, options.blank_images
    )
    chosen = generation_options(options, tokenizer, stop_sequences(options.chat_format, tokenizer))
    stops = StopTexts(tuple(options.stop), tokenizer)
    return (
        encoder,
        lambda requests: engine.generate(requests, chosen),
        lambda tokens: stops.cut(tokenizer.decode(tokens)).strip(),
    )


def _converse(options: argparse.Namespace) -> None:
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.parallel.topology import Topology

    with Topology(parallel_config(options)) as topology:
        converse(Conversation(*_load(options, topology), options.system), options, _read_line)


def _read_line() -> str | None:
    """Return the next line of the user, or None at the end."""
    try:
        return input("> ")
    except EOFError:
        return None
