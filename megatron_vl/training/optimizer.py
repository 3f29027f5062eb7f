"""AdamW through Megatron-Core's optimizers, the learning rate of a step, and each parameter's multiple of it.

The schedule is a pure function of the step, so resuming it needs no state. Layer-wise decay follows BEiT. With D vision
layers, layer i (from 0) learns at lr x decay^(D - i). The patch and position embeddings learn at lr x decay^(D + 1),
and everything after the vision tower at lr. Vectors (norms, biases) have no weight decay. Tables have it, as in the
released script, and so has the resampler's position table where it trains.

A parameter group is made once and stores its two multiples (``lr_mult``, ``wd_mult``). Everything else that an update
depends on is set from the configuration before each update, so a group keeps no value of an earlier run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import nn

from megatron_vl.config.schema import OptimizerConfig, RunConfig
from megatron_vl.parallel.topology import Topology


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of one update, over all parameter groups."""

    smallest: float
    largest: float


def learning_rate(step: int, config: OptimizerConfig, *, train_iters: int) -> float:
    """Return the learning rate of the update from ``step`` to ``step + 1``, without layer-wise decay.

    It is linear from 0 over ``lr_warmup_iters`` (the first update has lr / warm-up). Then it decays to ``min_lr`` at
    ``lr_decay_iters``.
    """
    if step < config.lr_warmup_iters:
        return config.lr * (step + 1) / config.lr_warmup_iters
    last = config.lr_decay_iters or train_iters
    if config.lr_decay_style == "constant":
        return config.lr
    progress = min(1.0, (step - config.lr_warmup_iters) / max(1, last - config.lr_warmup_iters))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.lr_decay_style == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * share


def layer_multiplier(name: str, *, num_layers: int, decay: float) -> float:
    """Return the learning-rate multiple of a parameter, by its global name."""
    layer = re.match(r"vision\.layers\.(\d+)\.", name)
    if layer:
        return decay ** (num_layers - int(layer[1]))
    return decay ** (num_layers + 1) if name.startswith("vision.") else 1.0


def build_optimizer(config: RunConfig, chunks: Sequence[DistributedDataParallel]) -> ChainedOptimizer:
    """Build Megatron-Core's optimizer over this rank's wrapped chunks."""
    return get_megatron_optimizer(_core_config(config), list(chunks), config_overrides=_overrides(config))


def build_vision_optimizer(config: RunConfig, vision: DistributedDataParallel, topology: Topology) -> ChainedOptimizer:
    """Build the optimizer of a vision part that every rank holds whole; where sharded, it is so over all ranks."""
    optimizer = get_megatron_optimizer(
        _core_config(config),
        [vision],
        config_overrides=_overrides(config),
        use_gloo_process_groups=False,  # Megatron-Core makes none for groups that it is given
        pg_collection=topology.vision_groups,
    )
    for member in optimizer.chained_optimizers:
        member.data_parallel_group_gloo = topology.world_gloo  # a save sends parts of the optimizer over it
    return optimizer


def chain(*optimizers: ChainedOptimizer) -> ChainedOptimizer:
    """Return one optimizer that steps all of them, with one gradient norm."""
    return ChainedOptimizer([member for optimizer in optimizers for member in optimizer.chained_optimizers])


def _core_config(config: RunConfig) -> CoreOptimizerConfig:
    settings, bf16 = config.optimizer, config.training.bf16
    return CoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def set_groups(optimizer: MegatronOptimizer, config: RunConfig, step: int) -> LearningRates:
    """Set every parameter group to the configured values of the coming update."""
    settings = config.optimizer
    rate = learning_rate(step, settings, train_iters=config.training.train_iters)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        group["betas"] = (settings.adam_beta1, settings.adam_beta2)
        group["eps"] = settings.adam_eps
    rates = [group["lr"] for group in optimizer.param_groups]
    return LearningRates(min(rates), max(rates))


def _overrides(config: RunConfig) -> dict[ParamKey, Any]:
    """Return Megatron-Core's overrides: the parameters without the default learning rate or weight decay."""
    settings, depth = config.optimizer, config.model.vision.num_layers

    def is_vector(parameter: nn.Parameter, name: str) -> bool:
        return parameter.dim() == 1 or name.endswith(".bias")

    overrides = {_key("vector", is_vector): {"wd_mult": 0.0}}
    if settings.vision_layer_decay != 1.0:
        for distance in range(1, depth + 2):
            multiple = settings.vision_layer_decay**distance
            overrides[_key(f"vision_layer_{distance}_from_top", _learns_at(multiple, config))] = {"lr_mult": multiple}
    return overrides


def _learns_at(multiple: float, config: RunConfig) -> Callable[[nn.Parameter, str], bool]:
    depth, decay = config.model.vision.num_layers, config.optimizer.vision_layer_decay

    def matches(_: nn.Parameter, name: str) -> bool:
        return layer_multiplier(name.removeprefix("module."), num_layers=depth, decay=decay) == multiple

    return matches


def _key(name: str, matches: Callable[[nn.Parameter, str], bool]) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))
