"""``tools/inspect_data.py PREFIX``: a prepared data set as one page that opens anywhere, or as tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.log import write_line

if TYPE_CHECKING:
    from megatron_vl.data.dataset.rows import RowStore

_MIN_SIDE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/inspect_data.py", __doc__, example="python tools/inspect_data.py data/mine --output page.html --seed 0"
    )
    parser.add_argument("prefix", help="path of a prepared data set, without .json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: PREFIX.html)")
    parser.add_argument(
        "--summary", action="store_true", help="print tables; the page is then written only with --output"
    )
    parser.add_argument("--rows", type=int, default=50, metavar="N", help="rows on the page (default: 50)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", type=int, default=0, metavar="K", help="begin at row K (default: 0)")
    which.add_argument("--seed", type=int, metavar="S", help="choose rows at random, the same ones for the same S")
    parser.add_argument("--source", metavar="NAME", help="only rows with a sample of this source")
    parser.add_argument("--task", metavar="NAME", help="only rows with a sample of this task")
    parser.add_argument(
        "--max-image-side", type=int, default=384, metavar="PIXELS", help="size of the pictures (default: 384)"
    )
    parser.add_argument(
        "--vocab-file",
        type=Path,
        metavar="FILE",
        help="for a data set of another vocabulary than Qwen's: its .tiktoken",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    from megatron_vl.inspector.opening import open_store

    check_at_least("--rows", options.rows, 1)
    check_at_least("--seed", options.seed or 0, 0)
    check_at_least("--max-image-side", options.max_image_side, _MIN_SIDE)
    store = open_store(options.prefix)
    path = options.output or (None if options.summary else Path(f"{options.prefix}.html"))
    if path is not None:
        check_writable(path)
    if options.summary:
        _print_summary(store)
    if path is not None:
        _write_page(store, path, options)


def _print_summary(store: RowStore) -> None:
    from megatron_vl.inspector.overview import read_overview
    from megatron_vl.inspector.summary import format_summary

    write_line(format_summary(read_overview(store)))


def _write_page(store: RowStore, path: Path, options: argparse.Namespace) -> None:
    from megatron_vl.inspector.choice import RowChoice
    from megatron_vl.inspector.opening import open_vocabulary
    from megatron_vl.inspector.page import read_page, render_page

    vocabulary = open_vocabulary(options.prefix, store.manifest, options.vocab_file)
    choice = RowChoice(options.rows, options.first, options.seed, options.source, options.task)
    page = read_page(store, vocabulary, choice, max_image_side=options.max_image_side)
    write_whole(path, render_page(page))
    size = f"{len(page.rows)} of {len(store):,} rows, {path.stat().st_size / 1e6:.1f} MB"
    write_line(f"Page: {path} ({size}{_count_problems(page.problems)})")


def _count_problems(problems: Sequence[tuple[int, str]]) -> str:
    if not problems:
        return ""
    row, problem = problems[0]
    return f", {len(problems)} problem{'s' if len(problems) > 1 else ''}, the first in row {row}: {problem}"
