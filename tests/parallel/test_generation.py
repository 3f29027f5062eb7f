"""Generation and log-likelihoods equal full recomputation in one process, at every kind of layout and any batch."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vl.generation.sampling import GREEDY, Sampling
from tests.helpers.ranks import RankPools
from tests.helpers.tiny import tiny_config
from tests.parallel.generating import (
    forward_scores_on_rank,
    generate_from_ties,
    generate_on_rank,
    recompute_on_rank,
    score_on_rank,
)

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_layout": "V*2|V*2RL*4"},
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
]


SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": Sampling(temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=11),
}


def world_sizes(parallel: dict[str, Any]) -> set[int]:
    """Those of the layout at data 1, and at data 2 up to 4 ranks."""
    size = parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)
    return {size, 2 * size} & {1, 2, 4}


@pytest.fixture(scope="module", params=SAMPLINGS)
def sampling(request: pytest.FixtureRequest) -> Sampling:
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def expected(ranks: RankPools, sampling: Sampling) -> list[list[int]]:
    tokens: list[list[int]] = ranks(1).run(recompute_on_rank, tiny_config(), sampling)[0]
    assert len({tuple(answer) for answer in tokens}) > 1, "the prompts should not all have one answer"
    return tokens


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_cached_tokens_equal_full_recomputation(
    ranks: RankPools, expected: list[list[int]], sampling: Sampling, parallel: dict[str, Any]
) -> None:
    for world_size in world_sizes(parallel):
        for tokens in ranks(world_size).run(generate_on_rank, tiny_config(parallel=parallel), sampling):
            assert tokens == expected


def test_an_answer_depends_on_no_other_question(
    ranks: RankPools, expected: list[list[int]], sampling: Sampling
) -> None:
    for batch_size in (1, 2, 5):
        assert ranks(1).run(generate_on_rank, tiny_config(), sampling, batch_size)[0] == expected
    for number, answer in enumerate(expected):
        assert ranks(1).run(generate_on_rank, tiny_config(), sampling, 1, number)[0] == [answer]


def test_another_seed_gives_other_answers(ranks: RankPools) -> None:
    drawn = [ranks(1).run(generate_on_rank, tiny_config(), Sampling(temperature=1.5, seed=seed))[0] for seed in (1, 2)]
    assert all(first != second for first, second in zip(*drawn, strict=True))


@pytest.fixture(scope="module")
def forward_scores(ranks: RankPools) -> list[list[list[float]]]:
    found: list[list[list[float]]] = ranks(1).run(forward_scores_on_rank, tiny_config())[0]
    return found


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_log_likelihoods_equal_the_forward_pass(
    ranks: RankPools, forward_scores: list[list[list[float]]], parallel: dict[str, Any]
) -> None:
    for world_size in world_sizes(parallel):
        for batch_size in (1, 3) if parallel == {} else (3,):
            for found in ranks(world_size).run(score_on_rank, tiny_config(parallel=parallel), batch_size):
                for number, (item, exact) in enumerate(zip(found, forward_scores, strict=True)):
                    assert item.number == number
                    for values, logits in zip(item.per_token, exact, strict=True):
                        assert values == pytest.approx(logits, abs=2e-5)
                    assert item.sums == pytest.approx([sum(values) for values in exact], abs=1e-4)
                    assert item.means == pytest.approx([sum(v) / len(v) for v in exact], abs=2e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_of_equal_logits_the_lowest_id_is_chosen(ranks: RankPools, world_size: int, bf16: bool) -> None:
    config = tiny_config(parallel={"tensor_model_parallel_size": world_size}, training={"bf16": bf16})
    for tokens in ranks(world_size).run(generate_from_ties, config):
        assert tokens == [[0, 0]] * 5
