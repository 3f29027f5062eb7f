"""What matrix products of the model's shapes reach alone: forward, gradient of the input, gradient of the weight.

The ceiling of a row is the time of all its products at these rates; a step can be no faster than that. Inputs are
random (zeros run faster) and taken in turn from sets that do not fit in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_parts.device import current_device, median_ms, peak_flops
from gpu_parts.report import Report
from gpu_parts.rows import SHAPES, make_batches
from gpu_parts.training import STAGES, Sizes, stage_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import FrozenParts, Work, step_flops


@dataclass(frozen=True)
class Product:
    """x [m, k] @ w [k, n], computed ``count`` times for a row."""

    name: str
    m: int
    k: int
    n: int
    count: int

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.m * self.k * self.n


def products_of(config: RunConfig, work: Work) -> list[Product]:
    """The products of a row of stage 2, as they are computed, padding with it; attention is none of them."""
    model = config.model
    vision, language = model.vision, model.language
    tokens, patches = config.data.seq_length, work.num_images * model.num_patches
    width, hidden = vision.hidden_size, language.hidden_size
    layers, blocks = language.num_layers, vision.num_layers
    return [
        Product("language qkv", tokens, hidden, 3 * hidden, layers),
        Product("language proj", tokens, hidden, hidden, layers),
        Product("language fc1", tokens, hidden, 2 * language.ffn_hidden_size, layers),
        Product("language fc2", tokens, language.ffn_hidden_size, hidden, layers),
        Product("head", work.num_supervised, hidden, language.vocab_size, 1),
        Product("vision qkv", patches, width, 3 * width, blocks),
        Product("vision proj", patches, width, width, blocks),
        Product("vision fc1", patches, width, vision.ffn_hidden_size, blocks),
        Product("vision fc2", patches, vision.ffn_hidden_size, width, blocks),
        Product("resampler kv", patches, width, hidden, 1),
    ]


def measure_products(report: Report, *, small: bool) -> None:
    """Rates of the products, their time for a row of stage 2, and the copy rate of the memory."""
    stage = STAGES["stage2"]
    config = stage_config(stage, Sizes.of(small=small, backend="local"))
    work = make_batches(config, SHAPES[stage.shape], count=1)[0].work
    peak, source = peak_flops()
    floor = 0.0
    for product in products_of(config, work):
        milliseconds = _three_products(product)
        floor += product.count * milliseconds
        rate = 3 * product.flops / milliseconds / 1e9
        shape = f"{product.m} x {product.k} x {product.n}"
        report.rate(f"products: {product.name} {shape}, TFLOP/s ({source})", rate, peak / 1e12, goal=None)
    required = 1e3 * step_flops(config.model, FrozenParts(), work) / peak
    report.cost("products: all of a row of stage 2 at full depth, ms", floor, required, goal=None)
    _report_copy(report, small=small)


def _three_products(product: Product) -> float:
    """Milliseconds of a product and its two gradients."""
    device = current_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sets = [
        tuple(_random(shape, device, dtype) for shape in _shapes(product))
        for _ in range(3 if device.type == "cuda" else 1)
    ]
    turns = _forever(len(sets))

    def run() -> None:
        x, weight, gradient = sets[next(turns)]
        _ = x @ weight.t(), gradient @ weight, gradient.t() @ x

    return median_ms(run, repeat=9, warm_up=3)


def _shapes(product: Product) -> tuple[tuple[int, int], ...]:
    return (product.m, product.k), (product.n, product.k), (product.m, product.n)


def _random(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _forever(count: int) -> Iterator[int]:
    number = 0
    while True:
        yield number % count
        number += 1


def _report_copy(report: Report, *, small: bool) -> None:
    size = 2**24 if small else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=current_device()).random_()
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), repeat=9)
    report.figure("memory: GB/s of a copy, read and written", 2 * size / milliseconds / 1e6)
