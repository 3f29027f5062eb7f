"""``tools/make_synthetic_data.py OUT``: render scenes and pages whose texts are true, in published formats.

Held-out data come from the other side of a hash of the content (``--split heldout``), so they share no scene with the
training data.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.parser import CommandParser
from megatron_vl.data.synthetic.config import FAMILIES, PROFILES, SyntheticConfig, scaled
from megatron_vl.data.synthetic.generate import generate
from megatron_vl.errors import ConfigError
from megatron_vl.log import write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user, in one line."""
    return exit_status(lambda: run(build_parser().parse_args(argv)))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = CommandParser(
        "tools/make_synthetic_data.py",
        __doc__,
        example="python tools/make_synthetic_data.py raw --profile tiny --split train --num-scenes 300",
    )
    parser.add_argument("out", type=Path, help="folder to make; one that holds the same data set already is kept")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="tiny", help="what kind of images")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="which side of the content hash")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything")
    parser.add_argument(
        "--num-scenes",
        type=int,
        help="about so many rendered images of all families together, and text documents in proportion; photographs "
        "come on top (without them: --count photos=0)",
    )
    parser.add_argument(
        "--count",
        action="append",
        default=[],
        metavar="FAMILY=N",
        help=f"images of a family, may be repeated; families: {', '.join(FAMILIES)} (text: documents)",
    )
    parser.add_argument("--font-dir", action="append", default=[], help="folder of fonts to use before the system's")
    parser.add_argument("--background-dir", default="", help="folder of pictures to lay the paper of pages on")
    parser.add_argument("--corpus-en", default="", help="text file whose words English pages show (profile full)")
    parser.add_argument("--corpus-zh", default="", help="the same for Chinese pages")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that render")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> None:
    """Generate the requested data and print a summary."""
    if args.num_scenes is not None:
        check_at_least("--num-scenes", args.num_scenes, 1)
    check_at_least("--num-workers", args.num_workers, 1)
    summary = generate(
        resolve(args),
        args.out,
        num_workers=args.num_workers,
        progress=not args.no_progress and sys.stderr.isatty(),
    )
    write_line(f"{summary.folder}: {'already complete' if summary.reused else 'written'}")
    for family, count in summary.counts.items():
        write_line(f"  {family:<18}{count:>8}")
    top = list(summary.answers.items())[:5]
    if top:
        write_line("  most frequent answers: " + ", ".join(f"{answer} {share:.1%}" for answer, share in top))
    for note in summary.notes:
        write_line(f"  note: {note}")


def resolve(args: argparse.Namespace) -> SyntheticConfig:
    """Return the profile with the changes of the arguments. Raises ConfigError."""
    config = PROFILES[args.profile]
    counts = config.counts if args.num_scenes is None else scaled(config.counts, args.num_scenes)
    chosen = dict(counts)
    for item in args.count:
        family, _, number = item.partition("=")
        if family not in FAMILIES or not number.isdecimal():
            raise ConfigError(f"--count {item!r}: expected FAMILY=N with a family of {', '.join(FAMILIES)}")
        chosen[family] = int(number)
    paths = (
        str(Path(file).resolve()) if file else "" for file in (args.background_dir, args.corpus_en, args.corpus_zh)
    )
    background_dir, corpus_en, corpus_zh = paths
    page = dataclasses.replace(config.page, background_dir=background_dir, corpus_en=corpus_en, corpus_zh=corpus_zh)
    config = dataclasses.replace(config, page=page, font_dirs=tuple(args.font_dir), counts=tuple(chosen.items()))
    return dataclasses.replace(config, split=args.split, seed=args.seed)
