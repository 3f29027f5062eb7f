"""FP8 products in a tower's layers, by Transformer Engine, and what the device must have for them.

Weights stay in bf16, their masters in fp32. Within an FP8 context, the four linear layers of a transformer layer
quantize their inputs. Attention, norms and all that is not a layer stay in bf16. Three things are easily wrong without
a sign of it:

* **A weight is quantized anew in each step.** A linear layer keeps its quantized weight until ``is_first_microbatch``
  is set. Megatron-Core's schedule sets it on the first micro-batch of each chunk, but only if the *schedule's*
  configuration has ``fp8`` (``model/configs.py``). Otherwise the weights of the first step would be used for ever, and
  the updated ones would only go to the checkpoint. Under ``vision_parallel data`` no schedule runs the tower, so
  ``training/image_encoder.py`` sets it. The first backward pass after that replaces the sum of the weight gradients,
  which must be the first of the step.
* **Scales that depend on earlier micro-batches** (``delayed``) are agreed upon when the outermost context ends. So one
  context is around all layers of a tower. The other recipes have one around each layer, which lets
  ``first_last_layers_bf16`` leave layers out, by their number in the whole tower.
* **A layer that is computed again** must quantize as it did at first. Transformer Engine's own checkpoint function sees
  to that (``recompute`` of ``te.py``).

Only training passes have a context. Validation computes in bf16, as every other use of the weights does, so it changes
no scale and no quantized weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.backends.versions import BLACKWELL, BLOCKWISE_CUDA, FP8_LEAST, HOPPER, dotted, release
from megatron_vl.errors import ConfigError


def around_layers(config: TransformerConfig, *, training: bool) -> AbstractContextManager[Any]:
    """Return the context around all layers of a tower in a forward pass."""
    if not (training and config.fp8 and _is_delayed(config)):
        return nullcontext()
    context: AbstractContextManager[Any] = fp8_utils.get_fp8_context(config)
    return context


def around_layer(config: TransformerConfig, number: int, *, training: bool) -> AbstractContextManager[Any]:
    """Return the context around one layer, ``number`` of the whole tower from 0."""
    if not (training and config.fp8) or _is_delayed(config):
        return nullcontext()
    context: AbstractContextManager[Any] = fp8_utils.get_fp8_context(config, number)
    return context


def _is_delayed(config: TransformerConfig) -> bool:
    return bool(config.fp8_recipe == Fp8Recipe.delayed)


def check_device(recipe: str) -> None:
    """Refuse a device, or a CUDA, without the products of a recipe.

    The limits are those of Transformer Engine 2.11 (``pytorch/quantization.py``, ``check_fp8_support`` and those after
    it), which would stop at the first step.

    Raises:
        ConfigError: with what was found and what is needed.
    """
    capability = torch.cuda.get_device_capability()
    cuda = release(torch.version.cuda or "")
    told = f"training.fp8_recipe {recipe}: {torch.cuda.get_device_name()} has compute capability {dotted(capability)}"
    if capability < FP8_LEAST:
        raise ConfigError(
            f"{told}, and FP8 needs {dotted(FP8_LEAST)} or newer (Ada, Hopper, Blackwell); leave out --fp8-format"
        )
    if recipe == "mxfp8" and capability not in BLACKWELL:
        raise ConfigError(
            f"{told}, and MXFP8 needs one {BLACKWELL} (Blackwell of data centers); use --fp8-recipe tensorwise"
        )
    if recipe == "blockwise" and (capability < HOPPER or cuda < BLOCKWISE_CUDA):
        raise ConfigError(
            f"{told} and torch was built for CUDA {dotted(cuda) or 'of no version'}, and blockwise scaling needs "
            f"{dotted(HOPPER)} or newer and CUDA {dotted(BLOCKWISE_CUDA)} or newer; use --fp8-recipe tensorwise"
        )
