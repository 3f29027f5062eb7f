"""What Megatron-Core is told depends on the device and on which packages bring kernels."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vl.model import configs
from megatron_vl.model.configs import Target, core_configs
from tests.helpers.tiny import tiny_config


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of Megatron-Core's configurations, which it would refuse where Transformer Engine is absent."""
    recorded: list[dict[str, Any]] = []

    def record(**arguments: Any) -> int:
        recorded.append(arguments)
        return len(recorded) - 1

    monkeypatch.setattr(configs, "TransformerConfig", record)
    return recorded


@pytest.mark.parametrize(("device", "on_cpu"), [("cuda", False), ("cpu", True), ("meta", True)])
def test_megatron_core_names_the_cuda_device_only_for_cuda(
    given: list[dict[str, Any]], device: str, on_cpu: bool
) -> None:
    """It asks for it outright otherwise, within torch's meta context too. Kernels are asked for on CUDA alone."""
    core_configs(tiny_config(), Target(device, transformer_engine=False))
    assert [arguments["use_cpu_initialization"] for arguments in given] == [on_cpu] * 4
    assert [arguments["gradient_accumulation_fusion"] for arguments in given] == [not on_cpu] * 4


FP8 = ("fp8", "fp8_recipe")
EDGES = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


@pytest.mark.parametrize("parts", ["language", "both"])
def test_fp8_is_in_the_towers_that_have_it_and_in_the_schedule(given: list[dict[str, Any]], parts: str) -> None:
    """The schedule says when weights are quantized anew. It has no layers of its own."""
    training = {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "fp8_parts": parts, "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}  # fmt: skip
    made = core_configs(tiny_config(training=training), Target("cuda", transformer_engine=True))
    found = [{name: given[index].get(name) for name in (*FP8, *EDGES)} for index in _indices(made)]
    nothing = dict.fromkeys((*FP8, *EDGES))
    everything = dict(zip((*FP8, *EDGES), ("e4m3", "blockwise", True, 2, 0), strict=True))
    schedule = nothing | {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    assert found == [everything if parts == "both" else nothing, everything, nothing, schedule]


def test_without_a_format_megatron_core_hears_nothing_of_fp8(given: list[dict[str, Any]]) -> None:
    core_configs(tiny_config(), Target("cuda", transformer_engine=True))
    assert not [name for arguments in given for name in (*FP8, *EDGES) if name in arguments]


def _indices(found: configs.CoreConfigs) -> tuple[Any, ...]:
    return found.vision, found.language, found.head, found.schedule
