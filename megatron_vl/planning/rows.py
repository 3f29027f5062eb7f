"""What a mean row holds: the content of the work that is planned.

A plan needs three numbers that no recipe has: images, samples and tokens of a row. They come from the manifests of the
data if these are here, from flags, or from the assumption of :func:`~megatron_vl.planning.layout.assumed_work`, that
images fill half of a row. A plan says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import assumed_work


@dataclass(frozen=True)
class Row:
    """The mean content of a row."""

    images: float
    samples: float
    tokens: float
    """Tokens without padding."""
    sum_squared_spans: float
    supervised: float
    source: str
    """Where the numbers come from, for people."""

    def work(self, rows: float) -> Work:
        """Return the work of so many rows."""
        return Work(
            num_images=rows * self.images,
            num_tokens=rows * self.tokens,
            sum_squared_spans=rows * self.sum_squared_spans,
            num_supervised=rows * self.supervised,
        )

    def computed(self, config: RunConfig) -> Work:
        """Return the work of a micro-batch as ranks compute it.

        Where stages hold the vision part, they encode an image at least: a text-only micro-batch has a blank one.
        """
        work = self.work(config.training.micro_batch_size)
        return work if config.parallel.vision_parallel == "data" else replace(work, num_images=max(work.num_images, 1))


def assumed_row(config: RunConfig) -> Row:
    """Return the row of ``assumed_work``, with one image in each sample; of an unpacked data set, one sample."""
    work = assumed_work(config)
    if config.data.unpacked:
        return replace(make_row(config, images=1, samples=1), source="assumed: one sample with one image")
    source = f"assumed: images fill half of a row, one image a sample ({work.num_images:g} of each)"
    return replace(make_row(config, images=work.num_images, samples=work.num_images), source=source)


def make_row(config: RunConfig, *, images: float, samples: float, tokens: float | None = None) -> Row:
    """Return a row of these means.

    Its samples are equally long, all text is supervised, and it is full where ``tokens`` is not given.

    Raises:
        ConfigError: if the images do not fit into the row, or a number is not one of a row.
    """
    if not (math.isfinite(images) and math.isfinite(samples)):
        raise ConfigError(f"a row of {images:g} images and {samples:g} samples: expected numbers")
    if config.data.unpacked and samples != 1:
        raise ConfigError(f"data.unpacked: each row has one sample, and --samples-per-row is {samples:g}")
    total = float(config.data.seq_length if tokens is None else tokens)
    slots = images * (config.model.resampler.num_queries + 2)
    most = int(total // (config.model.resampler.num_queries + 2))
    if slots >= total or images > most or samples <= 0 or images < 0:
        raise ConfigError(
            f"a row of {total:g} tokens cannot hold {images:g} images of {config.model.resampler.num_queries} + 2 "
            f"positions (= {slots:g}) and text of {samples:g} samples; give other --images-per-row or --samples-per-row"
        )
    spans = max(1.0, samples) if config.data.attention_span == "segment" else 1.0
    return Row(images, samples, total, total**2 / spans, total - slots, "given")
