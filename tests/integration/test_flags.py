"""Flags whose effect no other test sees; ``tests/unit/config/test_flags.py`` says which test sees which."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step
from megatron_vl.training.trainer import Trainer
from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config


def _built(start: Start, config: RunConfig) -> tuple[str, dict[str, bool]]:
    with start.topology(config.parallel) as topology:
        model = build_parallel_model(config, topology)
        schedule, wrapped = model.chunks[0].config, model.wrapped[0]
        return type(model.optimizer.chained_optimizers[0]).__name__, {
            "sharded": wrapped.ddp_config.use_distributed_optimizer,
            "reduce": wrapped.ddp_config.overlap_grad_reduce and schedule.no_sync_func is not None,
            "gather": wrapped.ddp_config.overlap_param_gather and bool(wrapped.remove_forward_pre_hook_handles),
        }


@pytest.mark.parametrize(
    ("flags", "optimizer", "does"),
    [
        ((), "FP32Optimizer", ()),
        (("use_distributed_optimizer",), "DistributedOptimizer", ("sharded",)),
        (("overlap_grad_reduce",), "FP32Optimizer", ("reduce",)),
        (
            ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
            "DistributedOptimizer",
            ("sharded", "reduce", "gather"),
        ),
    ],
)
def test_optimizer_and_overlap_are_what_is_built(
    ranks: RankPools, flags: tuple[str, ...], optimizer: str, does: tuple[str, ...]
) -> None:
    config = tiny_config(parallel=dict.fromkeys(flags, True))
    expected = {name: name in does for name in ("sharded", "reduce", "gather")}
    assert ranks(1).run(_built, config) == [(optimizer, expected)]


def _timeout(start: Start, config: ParallelConfig) -> timedelta:
    with start.topology(config):
        group = dist.distributed_c10d._get_default_group()
        limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
        return limit


def test_collectives_end_after_the_timeout(ranks: RankPools) -> None:
    assert ranks(1).run(_timeout, ParallelConfig(distributed_timeout_minutes=3)) == [timedelta(minutes=3)]


def _calls(start: Start, config: RunConfig) -> tuple[int, int]:
    """How often a step of one micro-batch runs a layer's attention core, and its MLP."""
    with start.topology(config.parallel) as topology:
        model = build_parallel_model(config, topology)
        layer, calls = model.chunks[0].language_model.layers["1"], [0, 0]
        for place, part in enumerate((layer.self_attention.core_attention, layer.mlp)):
            plain = part.forward

            def counting(*args: Any, place: int = place, plain: Any = plain, **kwargs: Any) -> Any:
                calls[place] += 1
                return plain(*args, **kwargs)

            part.forward = counting
        train_step(model, micro_batches(config.model, 1), config=config, topology=topology, step=0)
        return calls[0], calls[1]


@pytest.mark.parametrize(("granularity", "calls"), [(None, (1, 1)), ("selective", (2, 1)), ("full", (2, 2))])
def test_recomputation_runs_layers_again(ranks: RankPools, granularity: str | None, calls: tuple[int, int]) -> None:
    config = tiny_config(training={"recompute_granularity": granularity})
    assert ranks(1).run(_calls, config) == [calls]


def _norms(start: Start, config: RunConfig) -> tuple[float, float]:
    """The norm of the gradients that a step reports, and of those that it applies."""
    with start.topology(config.parallel) as topology:
        seed_all(1)
        model = build_parallel_model(config, topology)
        update, applied = model.optimizer.step_with_ready_grads, []

        def noting() -> Any:
            applied.append(float(model.optimizer.get_grad_norm()))
            return update()

        model.optimizer.step_with_ready_grads = noting
        result = train_step(model, micro_batches(config.model, 1), config=config, topology=topology, step=0)
        return result.grad_norm, applied[0]


@pytest.mark.parametrize("sharded", [True, False])
def test_gradients_are_clipped_to_the_norm(ranks: RankPools, sharded: bool) -> None:
    parallel = {"use_distributed_optimizer": sharded}
    found = {
        clip: ranks(1).run(_norms, tiny_config(parallel=parallel, optimizer={"clip_grad": clip}))[0]
        for clip in (0.0, 0.125, 1e6)
    }
    reported = found[0.0][0]
    assert reported > 0.5
    assert {norm for norm, _ in found.values()} == {reported}
    assert [applied for _, applied in found.values()] == pytest.approx([reported, 0.125, reported], rel=1e-4)


def _config(prefix: str, **sections: dict[str, Any]) -> RunConfig:
    data = {"data_path": (prefix,), "seq_length": SEQ_LENGTH}
    sections["training"] = {"train_iters": 2, "global_batch_size": 4} | sections.get("training", {})
    return tiny_config(data=data, logging={"progress": False}, **sections)


def _deterministic(start: Start, config: RunConfig) -> bool:
    with start.topology(config.parallel) as topology:
        trainer = Trainer.set_up(config, topology)
        trainer.close()
        return torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_is_torch_s(ranks: RankPools, prefix: str) -> None:
    for wanted in (True, False):
        config = _config(prefix, training={"deterministic_mode": wanted})
        assert ranks(1).run(_deterministic, config) == [wanted]


def _begun(start: Start, config: RunConfig, steps: int) -> tuple[float, int, int, int, bool]:
    """Set a run up and train some steps; a weight, the optimizer's step, the run's step and rows, streams loaded."""
    with start.topology(config.parallel) as topology, mock.patch.object(contents.rng, "load_state_dict") as streams:
        trainer = Trainer.set_up(config, topology)
        if steps:
            trainer.loop()
        trainer.close()
        weight = trainer.model.chunks[0].language_model.output_layer.weight.double().sum().item()
        groups = {group.get("step", 0) for group in trainer.model.optimizer.param_groups}
        assert len(groups) == 1
        return weight, groups.pop(), trainer.state.step, trainer.state.consumed_rows, streams.called


def test_what_a_run_starts_from(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    """The table of ``docs/checkpoints.md``."""
    fresh = ranks(1).run(_begun, _config(prefix), 0)[0]
    saved = ranks(1).run(_begun, _config(prefix, checkpoint={"save": str(tmp_path)}), 2)[0]
    assert fresh[1:] == (0, 0, 0, False) and saved[1:] == (2, 2, 8, False) and saved[0] != fresh[0]
    load = {"load": str(tmp_path)}
    expected = {
        (): (2, 2, 8, True),
        ("no_load_optim",): (0, 2, 8, True),
        ("no_load_rng",): (2, 2, 8, False),
        ("finetune",): (0, 0, 0, False),
    }
    for flags, state in expected.items():
        config = _config(prefix, checkpoint=load | dict.fromkeys(flags, True))
        assert ranks(1).run(_begun, config, 0)[0] == (saved[0], *state), flags
    config = _config(prefix, checkpoint={"pretrained_checkpoint": str(tmp_path)})
    assert ranks(1).run(_begun, config, 0)[0] == (saved[0], 0, 0, 0, False)
