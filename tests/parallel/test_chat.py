"""Chats with a model of fresh weights: answers end at stop sequences."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import RankPools
from tests.helpers.tiny import tiny_config
from tests.parallel.chatting import LONG, stop_on_rank


@pytest.fixture(scope="module")
def endless(ranks: RankPools) -> list[list[int]]:
    answers: list[list[int]] = ranks(1).run(stop_on_rank, tiny_config(), (), 5)[0]
    assert [len(answer) for answer in answers] == [LONG] * len(answers)
    return answers


@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_answer_ends_before_the_first_stop_sequence(
    ranks: RankPools, endless: list[list[int]], batch_size: int
) -> None:
    stops = (tuple(endless[0][4:6]), (endless[1][8],), (endless[2][3], -1))
    cut = ranks(1).run(stop_on_rank, tiny_config(), stops, batch_size)[0]
    assert cut == [_before_first(answer, stops) for answer in endless]
    assert len(cut[0]) < LONG and len(cut[1]) < LONG and len({len(answer) for answer in cut}) > 1


def _before_first(answer: list[int], stops: tuple[tuple[int, ...], ...]) -> list[int]:
    places = (
        start
        for end in range(1, len(answer) + 1)
        for stop in stops
        for start in (end - len(stop),)
        if start >= 0 and tuple(answer[start:end]) == stop
    )
    return answer[: next(places, len(answer))]
