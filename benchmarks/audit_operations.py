"""Count the products of a forward and a backward pass on the meta device, for ``audit.py``."""

from __future__ import annotations

from megatron_vl.backends.platform import prepare_process

prepare_process()

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megatron_vl.config.schema import RunConfig  # noqa: E402
from megatron_vl.data.loading.batch import MicroBatch  # noqa: E402
from megatron_vl.model.build import build_on_meta  # noqa: E402
from megatron_vl.model.freeze import freeze  # noqa: E402
from megatron_vl.parallel.topology import Topology  # noqa: E402
from megatron_vl.planning.flops import Work  # noqa: E402

PARTS = {
    "vision": "vision",
    "resampler": "resampler",
    "language layers": "language_model",
    "head": "language_model.output_layer",
}
"""Modules of the network by part. The head does not run inside the forward pass of the language layers."""


def count_operations(config: RunConfig, work: Work) -> dict[str, int]:
    """Return the floating-point operations that torch counts for one micro-batch of ``work``, in each part."""
    with Topology(config.parallel) as topology:
        network = build_on_meta(config, topology)
        freeze(network, config.training, before=())
        with FlopCounterMode(display=False) as counter:
            network(_batch(config, work)).sum().backward()
        counts = counter.get_flop_counts()
        found = {part: sum(counts[f"QwenVL.{module}"].values()) for part, module in PARTS.items()}
        assert sum(found.values()) == counter.get_total_flops(), "a part is missing"
        return found


def _batch(config: RunConfig, work: Work) -> MicroBatch:
    """Return a micro-batch of one row, without memory."""
    images, length, labels = int(work.num_images), int(work.num_tokens), int(work.num_supervised)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    size = config.model.image_size
    return MicroBatch(
        tokens=integers(length),
        positions=integers(length),
        cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta"),
        span_lengths=(length,),
        supervised=integers(labels),
        targets=integers(labels),
        slots=integers(images * config.model.resampler.num_queries),
        pixels=torch.empty(max(images, 1), 3, size, size, dtype=torch.uint8, device="meta"),
        span_images=integers(images),
        num_images=max(images, 1),
        num_samples=1,
        num_tokens=length,
        squared_spans=length**2,
    )
