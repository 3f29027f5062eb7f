"""``tools/forward.py``: compute with a checkpoint on given tokens, to compare it with another implementation.

Reads a safetensors file:

    input_ids       int64[b, s]: rows, padded on the right if they differ in length; whatever lies between <img> and
                    </img> is an image slot
    pixels          float32[n, 3, H, W]: normalized images in the order of their spans, row by row; absent if there are
                    none
    labels          int64[b, s], optional: as input_ids, not shifted; -100 where a token is not to be learned

and writes one:

    logits          float32[b, s, vocabulary]
    visual_output   float32[n, queries, h], with pixels: the features that fill the slots
    loss            float32[1], with labels: mean over the supervised tokens of the batch
    grad_norm_total, grad_norm.<published name of the tensor>
                    float32[1], with labels: norms of the gradient of that loss, of every tensor that trains

Logits and visual_output are computed as in evaluation, loss and gradients as in training. The two differ for rows
longer than the native length (2048 tokens), for which Qwen changes its attention in evaluation only. The tool also runs
under torchrun, at any layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.cli.command import exit_status
from megatron_vl.cli.inference_flags import add_inference_flags, check_layout, parallel_config
from megatron_vl.cli.output import check_writable, whole_file
from megatron_vl.cli.parser import CommandParser
from megatron_vl.log import setup_logging, silence_dependency_warnings

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    silence_dependency_warnings()
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/forward.py",
        __doc__,
        example="python tools/forward.py --checkpoint runs/mine/golden --inputs inputs.safetensors --output "
        "ours.safetensors",
    )
    add_inference_flags(parser)
    parser.add_argument("--inputs", type=Path, required=True, help="safetensors file to read")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    return parser


def _run(options: argparse.Namespace) -> None:
    setup_logging()
    check_writable(options.output)
    check_layout(options)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.checkpoint.inference import load_for_inference
    from megatron_vl.evaluation.forward import forward, forward_config
    from megatron_vl.evaluation.forward_inputs import read_inputs
    from megatron_vl.parallel.topology import Topology

    inputs = read_inputs(options.inputs)
    length = inputs.input_ids.shape[1]
    parallel = parallel_config(options)
    with Topology(parallel) as topology:
        loaded = load_for_inference(
            options.checkpoint,
            lambda saved: forward_config(saved, parallel, seq_length=length, bf16=options.bf16),
            topology,
        )
        outputs = forward(loaded.chunks, inputs, config=loaded.config, topology=topology)
        if topology.rank == 0:
            _write(outputs, options.output)


def _write(outputs: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as place:
        try:
            save_file(outputs, place)
        except SafetensorError as error:
            raise OSError(str(error)) from error
