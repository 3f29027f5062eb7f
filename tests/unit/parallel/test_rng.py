from __future__ import annotations

import torch

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.parallel import rng
from tests.helpers.ranks import RankPools, Start


def _draws(start: Start, seed: int) -> list[list[float]]:
    """Numbers after seeding, after more draws, and after going back; and those of the tensor-parallel stream."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with start.topology(ParallelConfig(tensor_model_parallel_size=2)):
        rng.seed_all(seed)
        state = rng.state_dict()
        found = []
        for _ in range(2):
            rng.load_state_dict(state)
            with get_cuda_rng_tracker().fork():
                parallel = torch.rand(2)
            found.append(torch.cat([torch.rand(3), parallel]).tolist())
        return found


def test_streams_go_back_to_where_they_were_saved(ranks: RankPools) -> None:
    one, other = ranks(2).run(_draws, 1)
    assert one[0] == one[1] and other[0] == other[1]
    assert one[0][:3] == other[0][:3], "the default stream is the same on tensor-parallel ranks"
    assert one[0][3:] != other[0][3:], "the tensor-parallel stream is not"
    assert ranks(2).run(_draws, 2)[0] != one
