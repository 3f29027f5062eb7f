from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_vl.backends.local import LocalBackend
from megatron_vl.backends.select import select_backend
from megatron_vl.errors import ConfigError

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, auto may choose Transformer Engine")
def test_auto_is_local_without_cuda() -> None:
    assert isinstance(select_backend("auto"), LocalBackend)
    assert isinstance(select_backend("local"), LocalBackend)


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is installed")
def test_a_backend_that_is_not_there_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"parallel.backend: transformer_engine .*see Dockerfile.* --backend local"):
        select_backend("transformer_engine")
