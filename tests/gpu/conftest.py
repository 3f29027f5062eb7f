"""What the checks on a device need, and why they are skipped where it is not there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_vl.launch import set_device_environment

if torch.cuda.is_available():  # read when the libraries start, here and in the ranks; deterministic_mode needs it
    set_device_environment(tensor_parallel=True, deterministic=True)

HAS_TE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    marks = {mark.name for mark in request.node.iter_markers()}
    if "gpu" in marks and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if "transformer_engine" in request.node.name and not HAS_TE:
        pytest.skip("Transformer Engine is not installed")
