"""``tools/convert_checkpoint.py``: published Qwen-VL folders to checkpoints of ours and back, and checks of
either.

One process, no GPU. A folder or checkpoint appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.cli.command import exit_status
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.schema import ModelConfig, ResamplerConfig, TrainingConfig, VisionConfig
from megatron_vl.errors import ConversionError
from megatron_vl.log import silence_dependency_warnings, write_line

if TYPE_CHECKING:
    from megatron_vl.conversion.convert import ConvertedModel

_M_MMAP_THRESHOLD = -3
"""Defined in glibc's malloc.h."""
_LARGE_CHUNK = 4 * 2**20
"""Minimum number of bytes for which memory is a map of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    silence_dependency_warnings()
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    _give_freed_tensors_back()
    _COMMANDS[options.command](options)


def _give_freed_tensors_back() -> None:
    """Return the memory of a tensor to the system when it is freed.

    After glibc has seen large chunks freed, it keeps the next ones up to 32 MB for itself, in a heap with holes. This
    depends on thread timing and can double peak memory; a fixed threshold avoids it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have neither the function nor the problem
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_CHUNK)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/convert_checkpoint.py",
        __doc__,
        example="python tools/convert_checkpoint.py export runs/quickstart/model/stage3 runs/mine/hf --release "
        "chat --vocab-file",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    _add_import(commands.add_parser("import", help="a published folder to a checkpoint that every layout loads"))

    command = commands.add_parser("export", help="a checkpoint to a published folder")
    command.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, or directory of them (newest)")
    command.add_argument("folder", type=Path, metavar="HF_DIR", help="folder to write; must not exist")
    command.add_argument("--release", choices=("base", "chat"), default="base", help="whose generation defaults")
    command.add_argument("--format", choices=("safetensors", "bin"), default="safetensors", help="of the weights")
    command.add_argument("--reference", type=Path, metavar="DIR", help="imported folder whose code files to copy")
    command.add_argument(
        "--vocab-file",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the tokenizer's files too, from this qwen.tiktoken (without FILE: dashscope's)",
    )

    command = commands.add_parser("check", help="is every tensor there, in its shape, and finite?")
    command.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, or a published folder")
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", type=Path, nargs="?", metavar="HF_DIR", help="Qwen-VL folder with config.json and weights"
    )
    command.add_argument("checkpoint", type=Path, metavar="CKPT", help="directory that receives the checkpoint")
    start = command.add_argument_group("start of stage 1", "instead of HF_DIR; the resampler is fresh")
    start.add_argument("--vision", type=Path, metavar="FILE", help="OpenCLIP's ViT-bigG-14 (.bin or .safetensors)")
    start.add_argument("--language", type=Path, metavar="DIR", help="Qwen-7B folder with config.json and weights")
    for flag, value, text in (
        ("--vision-heads", VisionConfig.num_attention_heads, "attention heads of the vision tower"),
        ("--num-queries", ResamplerConfig.num_queries, "image features for the language model"),
        ("--num-bpe-tokens", ModelConfig.num_bpe_tokens, "byte-pair tokens of the vocabulary"),
        ("--image-size", ModelConfig.image_size // 2, "pixels of an image in stage 1"),
        ("--seed", TrainingConfig.seed, "of the resampler's weights"),
    ):
        start.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")


def _import(options: argparse.Namespace) -> None:
    from megatron_vl.checkpoint import store

    if steps := store.steps_in(options.checkpoint):
        raise ConversionError(
            f"{options.checkpoint}: holds checkpoints of steps {steps[0]} to {steps[-1]}; "
            "an imported model is step 0 of a new directory"
        )
    converted = _open_import(options)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.conversion.checkpoints import write_checkpoint

    with _progress("import", converted.num_bytes) as progress:
        written = write_checkpoint(converted, options.checkpoint, progress=progress)
    write_line(f"{written}: {len(converted)} tensors, {converted.num_bytes:,} bytes")


def _open_import(options: argparse.Namespace) -> ConvertedModel:
    from megatron_vl.conversion.convert import import_folder

    parts = (options.vision, options.language)
    if options.folder is not None and parts == (None, None):
        return import_folder(options.folder)
    if options.folder is not None or None in parts:
        raise ConversionError("import takes either HF_DIR, a folder of Qwen-VL, or both --vision and --language")
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.conversion.starting_point import StartOptions, starting_model

    start = StartOptions(
        vision_heads=options.vision_heads,
        num_queries=options.num_queries,
        num_bpe_tokens=options.num_bpe_tokens,
        image_size=options.image_size,
        seed=options.seed,
    )
    return starting_model(options.vision, options.language, start)


def _export(options: argparse.Namespace) -> None:
    from megatron_vl.checkpoint.tensors import open_checkpoint
    from megatron_vl.conversion.convert import ExportOptions, export_folder
    from megatron_vl.data.prompting.tokenizer import find_vocab_file

    vocab_file = None
    if options.vocab_file is not None:
        vocab_file = Path(options.vocab_file) if options.vocab_file else find_vocab_file()
    export_options = ExportOptions(
        file_format=options.format,
        release=options.release,
        reference=options.reference,
        vocab_file=vocab_file,
    )
    tensors = open_checkpoint(options.checkpoint)
    with _progress("export", tensors.num_bytes) as progress:
        size = export_folder(tensors, tensors.model, options.folder, options=export_options, progress=progress)
    write_line(f"{options.folder}: {size:,} bytes of weights")


def _check(options: argparse.Namespace) -> None:
    from megatron_vl.checkpoint.tensors import open_checkpoint
    from megatron_vl.conversion.convert import check_model, import_folder
    from megatron_vl.planning.parameters import count_parameters

    is_folder = (options.checkpoint / "config.json").is_file()
    tensors = import_folder(options.checkpoint) if is_folder else open_checkpoint(options.checkpoint)
    with _progress("check", tensors.num_bytes) as progress:
        check_model(tensors, tensors.model, progress=progress)
    counts = count_parameters(tensors.model)
    for module, count in counts.items():
        write_line(f"{module:40} {count:>16,}")
    write_line(f"{'parameters':40} {sum(counts.values()):>16,}")
    write_line(f"{options.checkpoint}: sound; {len(tensors)} tensors, {tensors.num_bytes:,} bytes")


@contextmanager
def _progress(name: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield the update function of a bar over bytes on standard error; no bar if that is no terminal."""
    from tqdm import tqdm

    with tqdm(total=num_bytes, desc=name, unit="B", unit_scale=True, disable=None) as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "import": _import,
    "export": _export,
    "check": _check,
}
