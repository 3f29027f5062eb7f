"""The CPU platform is written for certain versions of Megatron-Core; these tests fail when one moves underneath."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vl.backends import cpu
from megatron_vl.backends.versions import MEGATRON_CORE, installed_core
from tests.helpers.ranks import RankPools, Start
from tests.unit.backends.cuda_places import RECORD, Places, count_places
from tests.unit.backends.patches import recorded

# Named by Megatron-Core and not replaced, each with the reason why nothing here depends on it.
LEFT_ALONE = {
    "torch.cuda.is_available": "its answer, False, is what is wanted",
    "torch.cuda.device_count": "in writer processes, which core.py does not start",
    "torch.cuda.amp.custom_fwd": "a decorator; works without CUDA",
    "torch.cuda.amp.custom_bwd": "a decorator; works without CUDA",
    "torch.cuda.FloatTensor": "a type to compare with; see Tensor.type",
    "torch.cuda.HalfTensor": "a type to compare with; see Tensor.type",
    "torch.cuda.BFloat16Tensor": "a type to compare with; see Tensor.type",
    "torch.cuda.OutOfMemoryError": "caught, never raised on a CPU",
    "torch.cuda.CUDAGraph": "CUDA graphs are not used",
    "torch.cuda.default_generators": "behind the two functions of the tracker that are replaced",
    "torch.cuda.random.get_rng_state": "a context manager for graphs, which are not used",
    "torch.cuda.clock_rate": "telemetry of the straggler detector, which is not used",
    "torch.cuda.power_draw": "telemetry of the straggler detector, which is not used",
    "torch.cuda.temperature": "telemetry of the straggler detector, which is not used",
    "torch.cuda.utilization": "telemetry of the straggler detector, which is not used",
}
LEFT_ALONE_IN: dict[str, dict[str, str]] = {
    "0.16.1": {},
    "0.19.2": {"torch.cuda.Stream.priority_range": "for the streams of experts, which are not used"},
}


@pytest.fixture(scope="module")
def replaced() -> dict[str, Any]:
    """What install() replaces where there is no CUDA, by the name of its place."""
    assert not cpu.is_installed(), "the process of the tests stays as it is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return recorded(cpu, cpu.install)


@pytest.fixture(scope="module")
def places() -> Places:
    return count_places()


def test_megatron_core_names_cuda_where_it_did(places: Places) -> None:
    """After a change here, read cpu.py against the new places, then write the record anew (see cuda_places.py)."""
    record = json.loads(RECORD.read_text())
    assert record.keys() == MEGATRON_CORE.keys()
    assert places == record[installed_core()]


def test_what_megatron_core_names_is_replaced_or_left_alone_on_purpose(
    replaced: dict[str, Any], places: Places
) -> None:
    named = {name for counts in places.values() for name in counts}
    parts = {name for name in named if re.fullmatch(r"torch\.cuda(\.\w+)+", name)}
    assert parts - replaced.keys() == LEFT_ALONE.keys() | LEFT_ALONE_IN[installed_core()].keys()
    factories = {match[1] for name in named if (match := re.fullmatch(r'(torch\.\w+)\(device="cuda"\)', name))}
    assert len(factories) >= 3 and factories <= replaced.keys()
    assert ".cuda()" in named and "Tensor.cuda" in replaced


def test_only_places_that_exist_are_replaced(replaced: dict[str, Any]) -> None:
    """``recorded`` asserts it for each of them."""
    owners = {name.rpartition(".")[0] for name in replaced}
    core = {
        "megatron.core.tensor_parallel.random",
        "megatron.core.parallel_state",
        "megatron.core.distributed.param_and_grad_buffer",
    }
    assert owners == {"torch", "Tensor", "torch.cuda", "torch.cuda.nvtx"} | core


def test_recording_changed_nothing(replaced: dict[str, Any]) -> None:
    assert replaced["torch.zeros"] is not torch.zeros
    assert not cpu.is_installed()


def test_nothing_is_installed_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert recorded(cpu, cpu.install) == {}


def _answers(_: Start) -> dict[str, Any]:
    cpu.install()  # again: harmless
    tensor, device = torch.zeros(2, device="cuda"), torch.device("cuda", 0)
    return {
        "installed": cpu.is_installed(),
        "devices": [
            str(made.device)
            for made in (
                tensor,
                torch.tensor([1], device=device),
                tensor.to("cuda"),
                tensor.to(device=device, dtype=torch.float64),
                tensor.cuda(non_blocking=True),
                torch.empty_like(tensor, device="cuda:0"),
                torch.ones(1, device=torch.cuda.current_device()),
            )
        ],
        "dtype": str(tensor.to("cuda", torch.float64).dtype),
        "type": tensor.type(),
        "type with argument": tensor.type(torch.float64).dtype == torch.float64,
        "meta stays": str(torch.empty(1, device="meta").device),
        "memory": torch.cuda.memory_allocated(),
        "available": torch.cuda.is_available(),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is for machines without CUDA")
def test_an_installed_platform_answers_with_the_cpu(ranks: RankPools) -> None:
    answers = ranks(1).run(_answers)[0]
    assert answers == {
        "installed": True,
        "devices": ["cpu"] * 7,
        "dtype": "torch.float64",
        "type": "torch.cuda.FloatTensor",
        "type with argument": True,
        "meta stays": "meta",
        "memory": 0,
        "available": False,
    }


def test_a_rank_alone_reduces_its_buffer_without_asking_the_group(
    replaced: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no process group in this process, so whatever asks one fails."""
    reduce_scatter = replaced["megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func"]
    buffer = torch.arange(3.0)
    for size, output in ((2, buffer), (1, torch.zeros(3))):
        monkeypatch.setattr(dist, "get_world_size", lambda _, size=size: size)
        with pytest.raises(ValueError, match="process group"):
            reduce_scatter(output, buffer, group=None)
    assert reduce_scatter(buffer, buffer, group=None) is None
    assert buffer.tolist() == [0.0, 1.0, 2.0]
