"""The modules of the installed Transformer Engine as the model builds them: names, shapes, weights, marks, checkpoints.

Nothing is computed.
"""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.backend import select_backend
from megatron_vl.model.build import build_model
from megatron_vl.planning.parameters import model_tensors
from tests.gpu.parity import MODEL, parity_config, plain_name
from tests.helpers.ranks import RankPools, Start

BACKENDS = ("local", "transformer_engine")
STATE = "_extra_state"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]


def _config(number: int, *, tensor_parallel: int = 1) -> RunConfig:
    config = parity_config(BACKENDS[number], bf16=True)
    parallel = replace(
        config.parallel, tensor_model_parallel_size=tensor_parallel, sequence_parallel=tensor_parallel > 1
    )
    return replace(config, parallel=parallel)


def _weights(chunk: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): value.detach().float().cpu() for name, value in chunk.named_parameters()}


def _marks(chunk: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What gradient norms and reductions look at."""
    names = ("tensor_model_parallel", "partition_dim", "sequence_parallel")
    return {
        plain_name(name): tuple(getattr(value, mark, None) or None for mark in names)
        for name, value in chunk.named_parameters()
    }


def _built(start: Start, config: RunConfig) -> tuple[dict[str, Tensor], dict[str, tuple[Any, ...]]]:
    with start.topology(config.parallel) as topology:
        chunk = build_model(config, topology)[0]
        kinds = {type(module).__module__.split(".")[0] for module in chunk.modules()}
        assert ("transformer_engine" in kinds) == (config.parallel.backend == BACKENDS[1])
        return _weights(chunk), _marks(chunk)


def test_it_is_the_one_that_is_supported() -> None:
    assert select_backend(BACKENDS[1]).name == BACKENDS[1]


def test_names_shapes_and_fresh_weights_are_the_local_ones(ranks: RankPools) -> None:
    local, fused = (ranks(1).run(_built, _config(number))[0][0] for number in (0, 1))
    planned = {spec.name: spec.shape for spec in model_tensors(MODEL) if not spec.is_buffer}
    assert {name: tuple(value.shape) for name, value in fused.items()} == planned
    assert [name for name, value in local.items() if not torch.equal(fused[name], value)] == []


def test_marks_are_the_local_ones(ranks: RankPools) -> None:
    for size in (1, 2):
        local, fused = (ranks(size).run(_built, _config(number, tensor_parallel=size)) for number in (0, 1))
        for ours, theirs in zip(local, fused, strict=True):
            assert theirs[1] == ours[1]


def _save(start: Start, config: RunConfig, root: Path) -> Path:
    with start.topology(config.parallel) as topology:
        trained = contents.Trained(build_model(config, topology), None)
        return contents.save(trained, {"step": 0}, config=config, topology=topology, root=root)


def _loaded(start: Start, config: RunConfig, checkpoint: Path) -> dict[str, Tensor]:
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology, fresh_weights=False)
        contents.load(contents.Trained(chunks, None), checkpoint, config=config, topology=topology)
        return _weights(chunks[0])


@pytest.mark.parametrize("reader", [0, 1])
@pytest.mark.parametrize("writer", [0, 1])
def test_checkpoints_load_in_either(ranks: RankPools, tmp_path: Path, writer: int, reader: int) -> None:
    saved = ranks(1).run(_save, _config(writer), tmp_path)[0]
    found = ranks(1).run(_loaded, _config(reader), saved)[0]
    fresh = ranks(1).run(_built, _config(0))[0][0]
    assert [name for name, value in fresh.items() if not torch.equal(found[name], value)] == []


class _Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _attack(start: Start, config: RunConfig, root: Path, trap: Path) -> Path:
    """A checkpoint in which every module of Transformer Engine has a state of its own, as the package pickles it."""
    state = torch.frombuffer(bytearray(pickle.dumps(_Hostile(trap))), dtype=torch.uint8)
    with start.topology(config.parallel) as topology:
        chunk = build_model(config, topology)[0]
        names = [name for name in chunk.state_dict() if name.endswith(STATE)]
        chunk.load_state_dict(dict.fromkeys(names, state), strict=False)
        assert trap.exists(), "Transformer Engine unpickles it no more: there is nothing to attack"
        trap.unlink()
        trained = contents.Trained([_WithStates(chunk, names, state)], None)
        return contents.save(trained, {"step": 0}, config=config, topology=topology, root=root)


class _WithStates:
    """A chunk whose sharded state holds more tensors."""

    def __init__(self, chunk: Any, names: list[str], state: Tensor) -> None:
        self._chunk, self._names, self._state = chunk, names, state

    def sharded_state_dict(self) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return self._chunk.sharded_state_dict() | make_sharded_tensors_for_checkpoint(
            dict.fromkeys(self._names, self._state), "", {}
        )

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        pass


def test_a_checkpoint_runs_no_code(ranks: RankPools, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    saved = ranks(1).run(_attack, _config(1), tmp_path / "root", trap)[0]
    for reader in (1, 0):
        ranks(1).run(_loaded, _config(reader), saved)
        assert not trap.exists()
