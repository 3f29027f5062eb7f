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
