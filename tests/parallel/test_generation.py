"""Generation with a key-value cache gives the tokens of full recomputation in one process, at every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import RankPools
from tests.helpers.tiny import tiny_config
from tests.parallel.generating import generate_from_ties, generate_on_rank, recompute_on_rank

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_layout": "V*2|V*2RL*4"},
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
]


@pytest.fixture(scope="module")
def expected(ranks: RankPools) -> list[list[int]]:
    tokens: list[list[int]] = ranks(1).run(recompute_on_rank, tiny_config())[0]
    assert len({tuple(answer) for answer in tokens}) > 1, "the prompts should not all have one answer"
    return tokens


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_cached_tokens_equal_full_recomputation(
    ranks: RankPools, expected: list[list[int]], parallel: dict[str, Any]
) -> None:
    size = parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)
    for world_size in {size, 2 * size} & {1, 2, 4}:
        for tokens in ranks(world_size).run(generate_on_rank, tiny_config(parallel=parallel)):
            assert tokens == expected


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_of_equal_logits_the_lowest_id_is_chosen(ranks: RankPools, world_size: int, bf16: bool) -> None:
    config = tiny_config(parallel={"tensor_model_parallel_size": world_size}, training={"bf16": bf16})
    for tokens in ranks(world_size).run(generate_from_ties, config):
        assert tokens == [[0, 0]] * 5
