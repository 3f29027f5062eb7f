"""``tools/prepare_data.py RECIPE``: raw data sets -> a data set of packed rows, and a table of what was kept
and why not."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.addresses import require_local
from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.presets import PRESETS
from megatron_vl.errors import ConfigError
from megatron_vl.launch import read_launch
from megatron_vl.log import write_line

if TYPE_CHECKING:
    from megatron_vl.data.dataset.manifest import Manifest
    from megatron_vl.data.prepare.recipe import DataRecipe
    from megatron_vl.data.prepare.share import Share
    from megatron_vl.data.prepare.workers import Pool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    goes_on = "interrupted; the same command goes on from what is finished"
    return exit_status(lambda: _run(_build_parser().parse_args(argv)), if_interrupted=goes_on)


def output_prefix(output: str | None, recipe: Path) -> Path:
    """Return the prefix for ``--output``; a folder (existing, or ending in a slash) gets the recipe's name added."""
    if output is None:
        return recipe.with_suffix("")
    if output.endswith(".json"):
        raise ConfigError(f"--output {output}: expected the data set's prefix, the path without .json")
    require_local(output, "--output", "prepare there, and copy the data set to its store afterwards")
    path = Path(output)
    return path / recipe.stem if output.endswith("/") or path.is_dir() else path


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/prepare_data.py",
        __doc__,
        example="python tools/prepare_data.py my_data.yaml --model-preset tiny --output data/mine",
    )
    parser.add_argument("recipe", type=Path, help="YAML file that lists the sources and how rows are packed")
    parser.add_argument("--output", help="prefix of the data set, or a folder (default: the recipe without .yaml)")
    parser.add_argument(
        "--root",
        help="folder, or address such as s3://BUCKET/FOLDER, from which relative paths count (default: the recipe's "
        "folder)",
    )
    parser.add_argument(
        "--workers", type=int, help="processes (default: one per core); under mpirun the other ranks work instead"
    )
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="who works: processes of this machine, or the ranks of mpirun; or a Ray cluster that runs",
    )
    parser.add_argument(
        "--model-preset", choices=sorted(PRESETS), help="take num_queries and num_bpe_tokens of this model preset"
    )
    parser.add_argument(
        "--phase",
        choices=("parts", "plan", "rows"),
        help="do a share of one phase: every share of parts, then plan, then every share of rows (default: all)",
    )
    parser.add_argument(
        "--shard-index", type=int, help="which share of the phase is done here, from 0 (default: all of it)"
    )
    parser.add_argument("--num-shards", type=int, help="number of shares, the same in all jobs of a phase")
    parser.add_argument("--verify", action="store_true", help="do not prepare: check the files of a finished data set")
    parser.add_argument(
        "--keep-parts",
        action="store_true",
        help="keep the tokenized parts, so that a run with other weights, amounts or packing does not tokenize again",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out sources whose files are not there, and say so (a file that is there must be readable)",
    )
    parser.add_argument(
        "--allow-empty",
        action="store_true",
        help="go on if nothing of a source passes, with a warning (by default that is an error)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(options: argparse.Namespace) -> None:
    # Imported late, so that --help does not wait for the readers and their libraries.
    from megatron_vl.data.dataset.manifest import verify_files
    from megatron_vl.data.prepare.workers import open_pool

    prefix = output_prefix(options.output, options.recipe)
    if options.workers is not None:
        check_at_least("--workers", options.workers, 1)
    if options.verify:
        if read_launch().rank > 0:
            return
        verify_files(prefix)
        write_line(f"{prefix}: all files are as the manifest says")
        return
    share = _share(options)
    alone = options.phase == "plan"
    with open_pool(1 if alone else options.workers, "processes" if alone else options.engine) as pool:
        if pool is not None:  # otherwise another rank has the result of this rank's work
            recipe = _recipe(options)
            if options.phase:
                _phase(options, recipe, prefix, share=share, pool=pool)
            else:
                _whole(options, recipe, prefix, pool)


def _share(options: argparse.Namespace) -> Share:
    """Return the share of this process. Raises ConfigError if flags contradict each other."""
    from megatron_vl.data.prepare.share import Share

    index, count = options.shard_index, options.num_shards
    if options.phase is None and (index is not None or count is not None):
        raise ConfigError("--shard-index and --num-shards need --phase, which says what is shared")
    if options.phase == "plan" and (index or 0, count or 1) != (0, 1):
        raise ConfigError("--phase plan: one process plans, so leave out --shard-index and --num-shards")
    if (index is None) != (count is None):
        raise ConfigError("expected --shard-index and --num-shards, or neither of them: found only one")
    return Share() if index is None else Share(index, count)


def _recipe(options: argparse.Namespace) -> DataRecipe:
    from megatron_vl.data.prepare.recipe import load_recipe, without_missing

    preset = PRESETS.get(options.model_preset)
    defaults = {"num_queries": preset.resampler.num_queries, "num_bpe_tokens": preset.num_bpe_tokens} if preset else {}
    recipe = load_recipe(options.recipe, defaults, root=options.root)
    if options.skip_missing:
        recipe, missing = without_missing(recipe)
        for line in missing:
            write_line(line)
    return dataclasses.replace(recipe, allow_empty=True) if options.allow_empty else recipe


def _whole(options: argparse.Namespace, recipe: DataRecipe, prefix: Path, pool: Pool) -> None:
    from megatron_vl.data.prepare.job import prepare

    manifest = prepare(recipe, prefix, pool=pool, progress=not options.quiet, keep_parts=options.keep_parts)
    _report(manifest, prefix)


def _phase(options: argparse.Namespace, recipe: DataRecipe, prefix: Path, *, share: Share, pool: Pool) -> None:
    from megatron_vl.data.prepare.phases import Settings, run_phase

    settings = Settings(share, pool, progress=not options.quiet, keep_parts=options.keep_parts)
    outcome = run_phase(recipe, prefix, options.phase, settings)
    if outcome.manifest is None:
        write_line(outcome.line)
    else:
        _report(outcome.manifest, prefix)


def _report(manifest: Manifest, prefix: Path) -> None:
    from megatron_vl.data.prepare.summary import summary_lines, warning_lines

    for line in summary_lines(manifest):
        write_line(line)
    write_line(f"prepared {prefix}")
    for line in warning_lines(manifest):
        write_line(f"warning: {line}", error=True)
