"""What the checks on a device need, and why they are skipped where it is not there."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# cuBLAS reads it once, when it is first used; deterministic_mode needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_TE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    marks = {mark.name for mark in request.node.iter_markers()}
    if "gpu" in marks and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if "transformer_engine" in request.node.name and not HAS_TE:
        pytest.skip("Transformer Engine is not installed")
