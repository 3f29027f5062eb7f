"""What an optimizer goes on with after a load: the moments, masters and step of the checkpoint, and nothing else of it.

Rates, betas, epsilon and weight decay are those of the run's own configuration, and neither the layout nor the kind of
the optimizer that wrote a checkpoint matters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_vl.checkpoint import contents, store
from megatron_vl.config.schema import OptimizerConfig, ParallelConfig, RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training import parallel_model
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import train_step
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, micro_batches, tiny_config
from tests.parallel.saving import train_steps

BEFORE = {
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_warmup_iters": 2,
    "weight_decay": 0.1,
    "vision_layer_decay": 0.8,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_eps": 1e-6,
}
AFTER: dict[str, dict[str, Any]] = {
    "the same": {},
    "lr": {"lr": 1e-4, "min_lr": 1e-5},
    "min_lr": {"min_lr": 5e-3},
    "betas": {"adam_beta1": 0.5, "adam_beta2": 0.6},
    "epsilon": {"adam_eps": 1e-2},
    "weight decay": {"weight_decay": 0.7},
    "layer decay": {"vision_layer_decay": 0.5},
    "no layer decay": {"vision_layer_decay": 1.0},
}
HALF = 3
ALL = 2 * HALF


@dataclass(frozen=True)
class Update:
    """What one update did to a parameter."""

    before: Tensor
    gradient: Tensor
    after: Tensor


def updates_on_rank(
    start: Start, config: RunConfig, save: Path | None, load: Path | None
) -> tuple[list[dict[str, Update]], list[tuple[float, float]]]:
    """Train up to ``train_iters``: each step's update of one parameter of each group, and its reported rates."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology, fresh_weights=load is None)
        trained, first = contents.Trained(model.chunks, model.optimizer), 0
        if load:
            first = contents.load(trained, load, config=config, topology=topology, load_rng=False)["step"]
        updates, rates = [], []
        for step in range(first, config.training.train_iters):
            noted = _note_updates(model)
            batches = micro_batches(config.model, 2, seed=100 * step)
            result = train_step(model, batches, config=config, topology=topology, step=step)
            updates.append(noted())
            rates.append((result.learning_rates.smallest, result.learning_rates.largest))
        if save:
            step = config.training.train_iters
            contents.save(trained, {"step": step}, config=config, topology=topology, root=save)
        return updates, rates


def _note_updates(model: ParallelModel) -> Callable[[], dict[str, Update]]:
    """Watch the next update; the function that is returned tells what it did."""
    inner = model.optimizer.chained_optimizers[0]
    watched: dict[tuple[int, bool], tuple[str, Tensor, Tensor]] = {}
    for name, parameter in model.chunks[0].named_parameters():
        watched.setdefault((_distance(name), parameter.dim() == 1), (name, parameter, _main(inner, parameter)))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    update = inner.step_with_ready_grads

    def noting() -> Any:
        for name, parameter, main in watched.values():
            seen[name] = parameter.detach().double().flatten(), main.grad.double().flatten()
        return update()

    inner.step_with_ready_grads = noting

    def done() -> dict[str, Update]:
        del inner.step_with_ready_grads
        return {name: Update(*seen[name], now.detach().double().flatten()) for name, now, _ in watched.values()}

    return done


def _main(inner: Any, parameter: Tensor) -> Tensor:
    """The tensor that the optimizer holds of a parameter."""
    if not hasattr(inner, "model_param_group_index_map"):
        return parameter
    group, order = inner.model_param_group_index_map[parameter]
    main: Tensor = inner.optimizer.param_groups[group]["params"][order]
    return main


def _distance(name: str) -> int:
    """Layers from the top of the vision tower; 0 behind it."""
    layer = re.match(r"vision\.layers\.(\d+)", name)
    above = MODEL.vision.num_layers - int(layer[1]) if layer else MODEL.vision.num_layers + 1
    return above if name.startswith("vision.") else 0


def _rate(settings: OptimizerConfig, step: int, name: str) -> float:
    """Warm-up and cosine, times decay to the power of the distance from the top of the tower."""
    warmup = settings.lr_warmup_iters
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (ALL - warmup)))
    rate = settings.lr * (step + 1) / warmup
    if step >= warmup:
        rate = settings.min_lr + (settings.lr - settings.min_lr) * share
    return rate * settings.vision_layer_decay ** _distance(name)


class AdamW:
    """Of one parameter, by its formula, in fp64."""

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def update(self, seen: Update, settings: OptimizerConfig, step: int, rate: float, *, decays: bool) -> Tensor:
        beta1, beta2 = settings.adam_beta1, settings.adam_beta2
        self.mean = beta1 * self.mean + (1 - beta1) * seen.gradient
        self.square = beta2 * self.square + (1 - beta2) * seen.gradient**2
        mean, square = self.mean / (1 - beta1 ** (step + 1)), self.square / (1 - beta2 ** (step + 1))
        shrunk = seen.before * (1 - rate * settings.weight_decay * decays)
        return shrunk - rate * mean / (square.sqrt() + settings.adam_eps)


def _config(sharded: bool, steps: int, **settings: Any) -> RunConfig:
    return tiny_config(
        parallel={"use_distributed_optimizer": sharded},
        training={"train_iters": steps},
        optimizer=BEFORE | {"lr_decay_iters": ALL} | settings,
    )


@pytest.fixture(scope="module")
def first_half(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Any]]:
    """A checkpoint and what led to it, with the sharded optimizer and with the other one."""
    root = tmp_path_factory.mktemp("half")
    return {
        kind: (root / str(kind), ranks(1).run(updates_on_rank, _config(kind, HALF), root / str(kind), None)[0])
        for kind in (True, False)
    }


@pytest.mark.parametrize(
    ("sharded", "changed"),
    [(True, changed) for changed in AFTER] + [(False, "the same"), (False, "layer decay")],
)
def test_every_group_follows_adamw_across_a_resume(
    ranks: RankPools, first_half: dict[bool, Any], sharded: bool, changed: str
) -> None:
    root, (early, early_rates) = first_half[sharded]
    resumed = _config(sharded, ALL, **AFTER[changed])
    late, late_rates = ranks(1).run(updates_on_rank, resumed, None, root)[0]
    configs = [_config(sharded, HALF)] * HALF + [resumed] * HALF
    names = early[0].keys()
    assert len(names) == 2 * (MODEL.vision.num_layers + 2), "with and without weight decay, at each distance"
    states = {name: AdamW() for name in names}
    for step, (config, seen) in enumerate(zip(configs, early + late, strict=True)):
        for name in names:
            rate, decays = _rate(config.optimizer, step, name), seen[name].before.numel() > 100
            expected = states[name].update(seen[name], config.optimizer, step, rate, decays=decays)
            difference = (expected - seen[name].after).abs().max().item()
            assert difference <= 1e-4 * rate + 1e-7, f"{name}, step {step}"
    for step, (config, rates) in enumerate(zip(configs, early_rates + late_rates, strict=True)):
        top, bottom = _rate(config.optimizer, step, "resampler.proj"), _rate(config.optimizer, step, "vision.")
        assert rates == pytest.approx((bottom, top), rel=1e-12)


def stored_on_rank(start: Start, checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    with start.topology(ParallelConfig()):
        stored = dist_checkpointing.load_plain_tensors(str(checkpoint))
        return {name: value for name, value in stored.items() if isinstance(value, Tensor)}


def save_again_on_rank(start: Start, config: RunConfig, source: Path, target: Path) -> None:
    """Load a checkpoint with its optimizer, and save what was loaded."""
    with few_parameters_in_a_bucket(), start.topology(config.parallel) as topology:
        model = build_parallel_model(config, topology, fresh_weights=False)
        trained = contents.Trained(model.chunks, model.optimizer)
        progress = contents.load(trained, source, config=config, topology=topology)
        contents.save(trained, progress, config=config, topology=topology, root=target)


def train_in_buckets_on_rank(start: Start, config: RunConfig, root: Path) -> None:
    """Train two steps with buckets that hold few parameters each, as those of a large model do."""
    with few_parameters_in_a_bucket():
        train_steps(start, config, 2, root, None)


def few_parameters_in_a_bucket() -> AbstractContextManager[Any]:
    """Where gradients are reduced during the backward pass; else there is one bucket."""
    few = partial(parallel_model.DistributedDataParallelConfig, bucket_size=3000)
    return mock.patch.object(parallel_model, "DistributedDataParallelConfig", few)


KINDS = {
    "dp2 sharded": (2, {"use_distributed_optimizer": True}),
    "dp2 sharded, in buckets": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
    "dp2 unsharded": (2, {"use_distributed_optimizer": False}),
    "tp2 unsharded": (2, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": False}),
    "pp2 sharded": (2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


@pytest.mark.parametrize(
    ("bf16", "frozen"), [(False, {"freeze_vision": True}), (True, {})], ids=["stage3-fp32", "all-bf16"]
)
def test_a_checkpoint_is_the_same_whichever_optimizer_writes_it(
    ranks: RankPools, tmp_path: Path, bf16: bool, frozen: dict[str, Any]
) -> None:
    """Written by each kind from what the one before has written: no bit of any tensor changes, and none is lost."""

    def config(kind: str) -> RunConfig:
        return tiny_config(parallel=KINDS[kind][1], training={"bf16": bf16, "train_iters": 9} | frozen)

    source = tmp_path / "first"
    ranks(2).run(train_steps, config("dp2 sharded"), 2, source, None)
    first = ranks(1).run(stored_on_rank, store.resolve(source))[0]
    masters = [name for name in first if name.startswith("optimizer.state.fp32_param.")]
    moments = [name for name in first if name.startswith("optimizer.state.exp_avg.")]
    assert len(masters) == (len(moments) if bf16 else 0)
    for kind in list(KINDS)[1:] + list(KINDS)[:1]:
        target = tmp_path / kind
        ranks(2).run(save_again_on_rank, config(kind), source, target)
        found = ranks(1).run(stored_on_rank, store.resolve(target))[0]
        assert found.keys() == first.keys()
        assert [name for name in first if not torch.equal(found[name], first[name])] == []
        source = target
    straight = ranks(2).run(train_steps, config("dp2 sharded"), 4, None, None)[0]
    assert ranks(2).run(train_steps, config("dp2 sharded"), 2, None, source)[0] == straight[2:]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_a_checkpoint_is_the_same_in_however_many_buckets_gradients_are_reduced(
    ranks: RankPools, tmp_path: Path, bf16: bool, tolerance: float
) -> None:
    """Some of the buckets are padded, so that the ranks can share them evenly.

    The norm of the gradients is summed in another order, so the factor that clips them may differ in its last bit.
    Where a gradient is zero but for rounding, as that of a key's bias, AdamW enlarges this.
    """
    training = {"bf16": bf16, "train_iters": 9}
    one = tiny_config(parallel=KINDS["dp2 sharded"][1], training=training)
    ranks(2).run(train_steps, one, 2, tmp_path / "one", None)
    overlapped = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    many = tiny_config(parallel=overlapped, training=training)
    ranks(2).run(train_in_buckets_on_rank, many, tmp_path / "many")
    expected, found = (ranks(1).run(stored_on_rank, store.resolve(tmp_path / name))[0] for name in ("one", "many"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("sharded", [True, False])
def test_precision_may_change(ranks: RankPools, tmp_path: Path, sharded: bool) -> None:
    """A bf16 run goes on from fp32 weights, and an fp32 run from masters: none is rounded on the way."""
    stored = {}
    source = None
    for bf16 in (False, True, False):
        parallel = {"use_distributed_optimizer": sharded}
        config, target = tiny_config(parallel=parallel, training={"bf16": bf16}), tmp_path / str(len(stored))
        if source is None:
            ranks(1).run(train_steps, config, 2, target, None)
        else:
            ranks(1).run(save_again_on_rank, config, source, target)
        stored[len(stored)] = ranks(1).run(stored_on_rank, store.resolve(target))[0]
        source = target
    assert stored[0].keys() == stored[2].keys()
    differing = [name for name in stored[0] if not torch.equal(stored[0][name], stored[2][name])]
    assert differing == ["resampler.pos_embed"], "which does not train, and so has no master"
    weight = "language_model.output_layer.weight"
    assert torch.equal(stored[1][weight], stored[0][weight].bfloat16())


@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_before_the_first_update_is_resumed(ranks: RankPools, tmp_path: Path, sharded: bool) -> None:
    """All steps before it may have been skipped."""
    config = tiny_config(parallel={"use_distributed_optimizer": sharded})
    ranks(1).run(train_steps, config, 0, tmp_path, None)
    straight = ranks(1).run(train_steps, config, 2, None, None)[0]
    assert ranks(1).run(train_steps, config, 2, None, tmp_path)[0] == straight


def refusal_on_rank(start: Start, config: RunConfig, source: Path) -> str:
    """What a load with the optimizer says."""
    try:
        train_steps(start, config, 1, None, source)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("parallel", [{"use_distributed_optimizer": True}, {"pipeline_model_parallel_size": 2}])
def test_parts_that_were_frozen_have_no_state_to_go_on_with(
    ranks: RankPools, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    """All ranks say so, whether or not they hold anything of these parts."""
    ranks(1).run(train_steps, tiny_config(training={"freeze_vision": True}), 1, tmp_path, None)
    said = ranks(2).run(refusal_on_rank, tiny_config(parallel=parallel), tmp_path)
    for text in said:
        assert re.search(r"holds no optimizer.state.exp_avg.vision.*Freeze the same parts, or start", text)
