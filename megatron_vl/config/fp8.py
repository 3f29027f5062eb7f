"""The rules of ``training.fp8_format``: what can be computed in FP8, as far as the configuration says it.

Transformer Engine computes the four linear layers of a transformer layer in FP8: forward, for the gradient of the input
and for the gradient of the weight. Each of the three products runs over another dimension, so positions and widths must
all be multiples of what its kernels take. Sources, in Transformer Engine 2.11:

* 16 of each: ``pytorch/utils.py``, ``assert_dim_for_fp8_exec``, asks for 8 positions and 16 columns; the product for
  the gradient of a weight runs over the positions, and cuBLAS takes 16 numbers of one byte at a time;
* MXFP8, 32 of each: ``pytorch/tensor/mxfp8_tensor.py``, ``make_empty``;
* blockwise under sequence parallelism, 128 positions of a rank: ``pytorch/tensor/float8_blockwise_tensor.py``,
  ``is_quantizable``. Other numbers would be gathered in bf16.

Delayed scaling takes its scales from the largest values of earlier micro-batches. Tensor- and data-parallel ranks agree
on these at the end of every forward pass of a tower, and only in passes with a graph. Three rules follow, see
:func:`_check_delayed` and :func:`_check_layers_in_bf16`.

What only the device can tell is in ``backends/fp8.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.errors import ConfigError


@dataclass(frozen=True)
class _Multiples:
    """What the numbers of a recipe's matrices are multiples of."""

    positions: int
    gathered: int
    """The positions of a rank that sequence parallelism gathers."""
    widths: int


_MULTIPLES: Mapping[str, _Multiples] = {
    "tensorwise": _Multiples(16, 16, 16),
    "delayed": _Multiples(16, 16, 16),
    "blockwise": _Multiples(16, 128, 16),
    "mxfp8": _Multiples(32, 32, 32),
}


@dataclass(frozen=True)
class _Part:
    """Layers that compute in FP8."""

    key: str
    num_layers: int
    widths: Mapping[str, int]
    positions: int
    """Of the smallest input of a linear layer; the others are multiples of it."""
    counted: str
    """How ``positions`` are counted, for people."""
    remedy: str
    tensor: int
    sequence_parallel: bool


def check_fp8(config: RunConfig, *, cuda: bool) -> None:
    """Refuse FP8 that cannot work, and options of it without it; raises ``ConfigError`` with the arithmetic."""
    training = config.training
    _check_effect(training)
    if training.fp8_format is None:
        return
    _check_surroundings(config, cuda=cuda)
    _check_delayed(config)
    for part in _parts(config):
        _check_layers_in_bf16(part, training)
        _check_widths(part, training.fp8_recipe)
        _check_positions(part, training.fp8_recipe)


def _check_effect(training: TrainingConfig) -> None:
    """Options of FP8 are given only where they do something."""
    usual, numbers = TrainingConfig(), ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    needs = dict.fromkeys(numbers, ("first_last_layers_bf16", "--first-last-layers-bf16"))
    if training.fp8_format is None:
        names = ("fp8_recipe", "fp8_parts", "first_last_layers_bf16", *numbers)
        needs = dict.fromkeys(names, ("fp8_format", "--fp8-format hybrid"))
    for name, (needed, flag) in needs.items():
        value = getattr(training, name)
        if value != getattr(usual, name) and not getattr(training, needed):
            raise ConfigError(
                f"training.{name} {value} has no effect without training.{needed}: leave it out, or add {flag}"
            )


def _check_surroundings(config: RunConfig, *, cuda: bool) -> None:
    """bf16 around the products, and Transformer Engine on CUDA for them."""
    told, backend = f"training.fp8_format is {config.training.fp8_format}", config.parallel.backend
    if not config.training.bf16:
        raise ConfigError(
            f"{told}, but training.bf16 is false: all that is not a product of layers is computed in bf16; add --bf16"
        )
    if backend == "local":
        raise ConfigError(
            f"{told}, but parallel.backend is local, and only Transformer Engine computes in FP8; use --backend "
            "transformer_engine, or leave the format out"
        )
    if not cuda:
        raise ConfigError(
            f"{told}, which needs Transformer Engine on CUDA, and no CUDA device was found; leave the format out"
        )


def _check_delayed(config: RunConfig) -> None:
    """Delayed scaling needs forward passes with a graph, and the same number of them on all ranks."""
    training = config.training
    if training.fp8_recipe != "delayed" or training.fp8_parts != "both":
        return
    told = "training.fp8_recipe delayed with training.fp8_parts both"
    remedy = "use --fp8-recipe tensorwise, or --fp8-parts language"
    if training.freeze_vision:
        raise ConfigError(
            f"{told} and training.freeze_vision: a frozen vision tower runs without a graph, and delayed scales are "
            f"updated only in passes with one, so they would stay at 1 and cut larger values; {remedy}"
        )
    if config.parallel.vision_parallel == "data":
        raise ConfigError(
            f"{told} and parallel.vision_parallel data: ranks encode their images in different numbers of passes, but "
            f"agree on delayed scales after every one, and so would wait for each other without end; {remedy}"
        )


def _parts(config: RunConfig) -> Iterator[_Part]:
    model, training, parallel = config.model, config.training, config.parallel
    rows, length = training.micro_batch_size, config.data.seq_length
    yield _Part(
        key="model.language",
        num_layers=model.language.num_layers,
        widths={"hidden_size": model.language.hidden_size, "ffn_hidden_size": model.language.ffn_hidden_size},
        positions=rows * length,
        counted=f"training.micro_batch_size {rows} x data.seq_length {length} = {rows * length} tokens",
        remedy="change one of the two",
        tensor=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )
    if training.fp8_parts == "language":
        return
    whole, side = parallel.vision_parallel == "data", model.patch_grid
    yield _Part(
        key="model.vision",
        num_layers=model.vision.num_layers,
        widths={"hidden_size": model.vision.hidden_size, "ffn_hidden_size": model.vision.ffn_hidden_size},
        positions=model.num_patches,
        counted=f"images of {side} x {side} = {model.num_patches} patches",
        remedy="use --fp8-parts language, or another model.image_size",
        tensor=1 if whole else parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and not whole,
    )


def _check_layers_in_bf16(part: _Part, training: TrainingConfig) -> None:
    """Some layers are in bf16, some in FP8; with delayed scaling, all are in FP8."""
    if not training.first_last_layers_bf16:
        return
    if training.fp8_recipe == "delayed":
        raise ConfigError(
            "training.first_last_layers_bf16 with training.fp8_recipe delayed: delayed scaling agrees on its scales "
            "once for all layers of a tower, so none can be left out; use --fp8-recipe tensorwise, or leave the option "
            "out"
        )
    first, last = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    told = (
        f"training.first_last_layers_bf16: num_layers_at_start_in_bf16 {first} + num_layers_at_end_in_bf16 {last} = "
        f"{first + last}"
    )
    if first + last == 0:
        raise ConfigError(f"{told} keeps no layer in bf16; leave the option out")
    if first + last >= part.num_layers:
        raise ConfigError(f"{told} leaves none of the {part.num_layers} layers of {part.key} in FP8; keep fewer")


def _check_widths(part: _Part, recipe: str) -> None:
    """The widths of what a rank multiplies are multiples."""
    multiple = _MULTIPLES[recipe].widths
    for name, width in part.widths.items():
        own = width // part.tensor
        if own % multiple:
            split = f" / parallel.tensor_model_parallel_size {part.tensor} = {own}" if part.tensor > 1 else ""
            raise ConfigError(
                f"training.fp8_recipe {recipe} needs widths in multiples of {multiple}, but {part.key}.{name} "
                f"{width}{split} = {own // multiple} x {multiple} + {own % multiple}"
            )


def _check_positions(part: _Part, recipe: str) -> None:
    """So are the positions: tokens of a micro-batch, or patches of an image."""
    gathers = part.sequence_parallel and part.tensor > 1
    multiple = _MULTIPLES[recipe].gathered if gathers else _MULTIPLES[recipe].positions
    own = part.positions // part.tensor if gathers else part.positions
    if own % multiple:
        split = f"; / parallel.tensor_model_parallel_size {part.tensor} = {own}" if gathers else ""
        wider = " of each rank under parallel.sequence_parallel" if gathers else ""
        raise ConfigError(
            f"training.fp8_recipe {recipe} needs positions{wider} in multiples of {multiple}, but {part.key} has "
            f"{part.counted}{split} = {own // multiple} x {multiple} + {own % multiple}; {part.remedy}"
        )
