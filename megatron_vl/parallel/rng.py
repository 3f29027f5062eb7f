"""Random streams of a rank.

Qwen-VL has no dropout, and the order of data is a pure function of the step. So nothing in a run draws random numbers
after the weights were initialized. The streams are seeded, saved and restored all the same. Recomputation forks them,
and a future layer with dropout must resume exactly.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random as core_random


def seed_all(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron-Core's tensor-parallel streams."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    seed_layers(seed)


def seed_layers(seed: int) -> None:
    """Seed only Megatron-Core's tensor-parallel streams.

    A layer of Transformer Engine forks them when it is built, even if its weights are initialized elsewhere. So they
    must exist.
    """
    core_random.model_parallel_cuda_manual_seed(seed)


def state_dict() -> dict[str, Any]:
    """Return the state of this rank's streams, as tensors and plain values."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": core_random.get_cuda_rng_tracker().get_states(),
    }


def load_state_dict(state: dict[str, Any]) -> None:
    """Restore what :func:`state_dict` returned."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    core_random.get_cuda_rng_tracker().set_states(dict(state["tracker"]))  # it keeps and changes the dict
