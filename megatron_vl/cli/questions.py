"""``tools/make_questions.py RECIPE``: raw data -> questions for ``tools/generate.py``, answers kept aside.

What is left out is counted by its reason, as in a data set. ``no_question``: documents, and dialogues that do not begin
with their only image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.presets import PRESETS
from megatron_vl.log import write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    check_at_least("--limit", options.limit, 1)
    from megatron_vl.data.prepare.recipe import load_recipe
    from megatron_vl.evaluation.asking import make_questions

    preset = PRESETS[options.model_preset]
    defaults = {"num_queries": preset.resampler.num_queries, "num_bpe_tokens": preset.num_bpe_tokens}
    recipe = load_recipe(options.recipe, defaults, root=options.root)
    counts, left_out = make_questions(recipe, options.output, limit=options.limit)
    write_line(f"{options.output}: " + ", ".join(f"{count} {task}" for task, count in counts.items()))
    if left_out:
        write_line("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/make_questions.py",
        __doc__,
        example="python tools/make_questions.py examples/tiny/data/heldout.yaml --model-preset tiny --root "
        "runs/quickstart/raw/heldout --output runs/quickstart/eval/questions.jsonl --limit 200",
    )
    parser.add_argument("recipe", type=Path, help="a recipe of tools/prepare_data.py, whose sources are asked")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the questions, as JSON lines")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="questions of each source")
    parser.add_argument("--root", help="folder, or address, from which relative paths of the recipe count")
    parser.add_argument("--model-preset", choices=sorted(PRESETS), default="qwen_vl_7b", help="the model's sizes")
    return parser
