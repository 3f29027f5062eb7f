"""``tools/generate.py``: answers of a checkpoint to a file of questions, also under torchrun with any layout.

A question is a JSON line ``{"key", "task", "image", "prompt", "reference"}``: ``image`` is a path (relative to the
file) or a list of them, put before the prompt in order; ``prompt`` is the text after the images, in which ``<ref>``,
``<box>`` and ``<quad>`` markers count as such. The output has the same lines with ``prediction`` added, in the same
order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vl.cli.parallel_flags import add_parallel_flags, parallel_config
from megatron_vl.config.schema import ModelConfig
from megatron_vl.errors import DataError, MegatronVLError, SkipSample
from megatron_vl.log import setup_logging, silence_dependency_warnings, write_line

EXIT_USER_ERROR = 2
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""The markers that a prompt may contain; any other special token's text stays plain text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    options = _build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    setup_logging()
    silence_dependency_warnings()
    try:
        _run(options)
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return EXIT_USER_ERROR
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/generate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or directory of them (newest)")
    parser.add_argument("--inputs", type=Path, required=True, help="questions, as JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions answered together")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a grey one")
    parser.add_argument("--vocab-file", help="Qwen's .tiktoken file (default: the one of the dashscope package)")
    add_parallel_flags(parser)
    return parser


def _run(options: argparse.Namespace) -> None:
    questions = read_questions(options.inputs)
    from megatron_vl.backends.platform import prepare_process
    from megatron_vl.parallel.topology import Topology

    prepare_process()
    with Topology(parallel_config(options)) as topology:
        predictions = _predictions(questions, options, topology)
        if topology.rank == 0:
            lines = [
                json.dumps({**question, "prediction": prediction}, ensure_ascii=False)
                for question, prediction in zip(questions, predictions, strict=True)
            ]
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _predictions(questions: list[dict[str, Any]], options: argparse.Namespace, topology: Any) -> list[str]:
    """The answer to each question, the same on every rank."""
    from megatron_vl.data.tokenizer import QwenTokenizer
    from megatron_vl.generation.engine import Engine, GenerationOptions

    parallel = parallel_config(options)
    engine = Engine.from_checkpoint(options.checkpoint, parallel=parallel, topology=topology, bf16=options.bf16)
    tokenizer = QwenTokenizer(engine.model.num_ranks, options.vocab_file)
    prompts = [_prompt(question, tokenizer, engine.model, options) for question in questions]
    limits = GenerationOptions(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    return [tokenizer.decode(tokens).strip() for tokens in engine.generate(prompts, limits)]


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of questions.

    Raises:
        DataError: the file cannot be read, or a line is not a question; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--inputs {path}: cannot be read ({error}); expected JSON lines with a prompt") from error
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(question, dict) or not isinstance(question.get("prompt"), str):
            raise DataError(f"{path}, line {number}: expected an object with a text 'prompt', found {line[:80]!r}")
        questions.append(question)
    return questions


def _prompt(question: dict[str, Any], tokenizer: Any, model: ModelConfig, options: argparse.Namespace) -> Any:
    import numpy as np
    import torch

    from megatron_vl.data.image import blank_pixels
    from megatron_vl.generation.engine import Prompt

    images = question.get("image") or []
    paths = [images] if isinstance(images, str) else list(images)
    special, tokens = tokenizer.special, []
    for _ in paths:
        tokens += [special.img_start, *[special.img_pad] * model.resampler.num_queries, special.img_end]
    tokens += tokenizer.encode_with_specials(question["prompt"], GROUNDING)
    if not paths:
        return Prompt(tuple(tokens))
    if options.blank_images:
        return Prompt(tuple(tokens), torch.from_numpy(blank_pixels(len(paths), model.image_size)))
    pixels = [_pixels(options.inputs.parent / path, question, model.image_size) for path in paths]
    return Prompt(tuple(tokens), torch.from_numpy(np.stack(pixels)))


def _pixels(path: Path, question: dict[str, Any], image_size: int) -> Any:
    from megatron_vl.data.image import to_pixels

    try:
        return to_pixels(path.read_bytes(), image_size)
    except (OSError, SkipSample) as error:
        raise DataError(f"question {question.get('key')!r}: image {path} cannot be used: {error}") from error
