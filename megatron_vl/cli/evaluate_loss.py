"""``tools/evaluate_loss.py``: the loss of a checkpoint on prepared data sets, also under torchrun with any layout.

Writes a JSON object with one entry for each data set: ``{"PREFIX": {"loss": ..., "num_tokens": ...}}``, where the loss
is that of a supervised token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vl.cli.command import exit_status
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parallel_flags import add_parallel_flags, parallel_config
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.log import setup_logging, silence_dependency_warnings, write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    options = _build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    setup_logging()
    silence_dependency_warnings()
    return exit_status(lambda: _run(options))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/evaluate_loss.py",
        __doc__,
        example="python tools/evaluate_loss.py --checkpoint runs/mine/stage2 --data-path "
        "runs/quickstart/data/heldout_vqa",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or directory of them (newest)")
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX", help="prepared data sets")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: standard output)")
    parser.add_argument("--micro-batch-size", type=int, default=8, metavar="ROWS", help="rows in a forward pass")
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a grey one")
    add_parallel_flags(parser)
    return parser


def _run(options: argparse.Namespace) -> None:
    from megatron_vl.backends.platform import prepare_process
    from megatron_vl.parallel.topology import Topology

    if options.output is not None:
        check_writable(options.output)
    prepare_process()
    with Topology(parallel_config(options)) as topology:
        losses = _losses(options, topology)
        if topology.rank == 0:
            text = json.dumps(losses, indent=1)
            if options.output is None:
                write_line(text)
            else:
                write_whole(options.output, text + "\n")


def _losses(options: argparse.Namespace, topology: Any) -> dict[str, dict[str, float]]:
    """The loss of the checkpoint on each data set, the same on every rank."""
    from megatron_vl.checkpoint import contents, store
    from megatron_vl.model.build import build_model

    saved = store.read_config(store.resolve(options.checkpoint))
    config = _configuration(saved, options, topology.world_size)
    chunks = build_model(config, topology, fresh_weights=False)
    trained = contents.Trained(chunks, None)
    contents.load(trained, options.checkpoint, config=config, topology=topology, load_rng=False)
    return {prefix: _loss(prefix, chunks, config, topology) for prefix in options.data_path}


def _configuration(saved: RunConfig, options: argparse.Namespace, world_size: int) -> RunConfig:
    """The saved model and rows, at the layout of this command; a step is one micro-batch for each pipeline stage."""
    parallel = parallel_config(options)
    rows = options.micro_batch_size * parallel.pipeline_model_parallel_size * data_parallel_size(parallel, world_size)
    return replace(
        saved,
        parallel=parallel,
        training=TrainingConfig(micro_batch_size=options.micro_batch_size, global_batch_size=rows),
        data=replace(saved.data, blank_images=options.blank_images, unpacked=False, valid_data_path=()),
    )


def _loss(prefix: str, chunks: Sequence[Any], config: RunConfig, topology: Any) -> dict[str, float]:
    from megatron_vl.training.feed import open_feed
    from megatron_vl.training.step import evaluate

    feed = open_feed(config, topology, data_path=(prefix,))
    try:
        loss = evaluate(chunks, feed.one_pass(), topology=topology)
    finally:
        feed.close()
    return {"loss": loss.mean, "num_tokens": loss.num_tokens}
