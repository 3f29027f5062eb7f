"""``tools/evaluate_loss.py``: measure the loss of a checkpoint on data sets. It also runs under torchrun.

It writes a JSON object with one entry for each data set: ``{"PREFIX": {"loss": ..., "num_tokens": ..., ...}}``. The
loss is the mean over the supervised tokens. The model is that of the checkpoint; how it was trained has no effect. An
entry also holds every setting on which its loss depends: the flags of this command, the image size, the native length,
and how the model treats longer sequences.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.inference_flags import add_inference_flags, check_layout, parallel_config
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_vl.errors import DataError, NotFiniteError
from megatron_vl.log import setup_logging, silence_dependency_warnings, write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    silence_dependency_warnings()
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/evaluate_loss.py",
        __doc__,
        example="python tools/evaluate_loss.py --checkpoint runs/mine/stage2 --data-path "
        "runs/quickstart/data/heldout_vqa",
    )
    add_inference_flags(parser)
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX", help="prepared data sets")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: standard output)")
    parser.add_argument("--micro-batch-size", type=int, default=8, metavar="ROWS", help="rows in a forward pass")
    parser.add_argument(
        "--attention-span",
        choices=("row", "segment"),
        default="segment",
        help="tokens that a token attends to: all earlier ones of its row, or of its own sample (default)",
    )
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a gray one")
    return parser


def _run(options: argparse.Namespace) -> None:
    setup_logging()
    check_at_least("--micro-batch-size", options.micro_batch_size, 1)
    if options.output is not None:
        check_writable(options.output)
    check_layout(options)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.parallel.topology import Topology

    with Topology(parallel_config(options)) as topology:
        losses = _losses(options, topology)
        if topology.rank == 0:
            text = json.dumps(losses, indent=1)
            if options.output is None:
                write_line(text)
            else:
                write_whole(options.output, text + "\n")


def _losses(options: argparse.Namespace, topology: Any) -> dict[str, dict[str, Any]]:
    """Return the loss of the checkpoint on each data set, and what it depends on; the same on every rank."""
    from megatron_vl.checkpoint.inference import load_for_inference
    from megatron_vl.data.dataset.manifest import read_manifest

    lengths = {prefix: read_manifest(prefix).seq_length for prefix in options.data_path}

    def adapt(saved: RunConfig) -> RunConfig:
        return _with_rows_of(_configuration(saved.model, options, topology.world_size), max(lengths.values()))

    loaded = load_for_inference(options.checkpoint, adapt, topology)
    losses = {}
    for prefix, length in lengths.items():
        config = _with_rows_of(loaded.config, length)
        losses[prefix] = _loss(prefix, loaded.chunks, config, topology) | _settings(config)
        losses[prefix]["checkpoint"] = str(loaded.checkpoint)
    return losses


def _configuration(model: ModelConfig, options: argparse.Namespace, world_size: int) -> RunConfig:
    """Return the saved model at the layout of this command; a step is one micro-batch per pipeline stage."""
    parallel = parallel_config(options)
    rows = options.micro_batch_size * parallel.pipeline_model_parallel_size * data_parallel_size(parallel, world_size)
    return RunConfig(
        model=model,
        parallel=parallel,
        data=DataConfig(attention_span=options.attention_span, blank_images=options.blank_images),
        training=TrainingConfig(micro_batch_size=options.micro_batch_size, global_batch_size=rows, bf16=options.bf16),
    )


def _with_rows_of(config: RunConfig, seq_length: int) -> RunConfig:
    return replace(config, data=replace(config.data, seq_length=seq_length))


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings on which a loss depends besides weights and rows, under the names of the configuration."""
    data, model = config.data, config.model
    return {
        "attention_span": data.attention_span,
        "seq_length": data.seq_length,
        "blank_images": data.blank_images,
        "bf16": config.training.bf16,
        "image_size": model.image_size,
        "native_seq_length": model.language.native_seq_length,
        "use_dynamic_ntk": model.language.use_dynamic_ntk,
        "use_logn_attn": model.language.use_logn_attn,
    }


def _loss(prefix: str, chunks: Sequence[Any], config: RunConfig, topology: Any) -> dict[str, Any]:
    from megatron_vl.training.feed import open_feed
    from megatron_vl.training.step import evaluate

    feed = open_feed(config, topology, data_path=(prefix,))
    try:
        loss = evaluate(chunks, feed.one_pass(), topology=topology)
    finally:
        feed.close()
    if not loss.num_tokens:
        raise DataError(f"{prefix}: none of its tokens is supervised, so there is no loss")
    if not math.isfinite(loss.mean):
        raise NotFiniteError(f"{prefix}: the loss is {loss.mean}: the weights are damaged, or have diverged")
    return {"loss": loss.mean, "num_tokens": loss.num_tokens}
