"""Sampling: each step equals that of ``transformers``, and a draw depends on nothing but its three integers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_vl.errors import ConfigError
from megatron_vl.generation.logits import choose_tokens, process_logits
from megatron_vl.generation.sampling import GREEDY, Sampling, draw

VOCABULARY = 50


def published(sampling: Sampling) -> LogitsProcessorList:
    """The processors in the order in which ``transformers`` builds them."""
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
            *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
            TopPLogitsWarper(sampling.top_p),
        ]
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_p=0.3),
        Sampling(temperature=1.3, top_p=0.9, top_k=7),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=0.2, top_k=500, top_p=0.999),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=2.0, repetition_penalty=1.3, top_k=20, top_p=0.8),
        Sampling(temperature=1.0, repetition_penalty=0.5),
    ],
    ids=lambda sampling: str(list(asdict(sampling).values())),
)
def test_the_steps_equal_those_of_transformers(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, VOCABULARY, generator=generator)
    ids = torch.randint(0, VOCABULARY, (64, 9), generator=generator)
    seen = torch.zeros(64, VOCABULARY, dtype=torch.bool).scatter(1, ids, value=True)
    expected = published(sampling)(ids, logits.clone())
    assert torch.equal(process_logits(logits, sampling, seen), expected)


def test_one_step_by_hand() -> None:
    """Divided by 2: 1.5, 1, 0.5, -1. The seen ones, 3 and -2, become 1.5 and -4 before. Top-k leaves 2, 1.5 and 1."""
    logits, seen = torch.tensor([[3.0, 2.0, 1.0, -2.0]]), torch.tensor([[True, False, False, True]])
    sampling = Sampling(temperature=0.5, repetition_penalty=2.0, top_k=3)
    assert process_logits(logits, sampling, seen).tolist() == [[3.0, 4.0, 2.0, -math.inf]]
    greedy = Sampling(repetition_penalty=2.0)
    assert choose_tokens(process_logits(logits, greedy, seen), greedy, []).tolist() == [1]
    assert choose_tokens(process_logits(logits, GREEDY), GREEDY, []).tolist() == [0]


def test_top_p_keeps_the_fewest_that_reach_it_and_of_equal_ones_the_lowest_ids() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.4, 0.1]]).log()
    kept = {
        p: process_logits(logits, Sampling(temperature=1.0, top_p=p)).isfinite()[0].tolist() for p in (0.3, 0.5, 0.85)
    }
    assert kept == {0.3: [True, False, False, False], 0.5: [True, False, True, False], 0.85: [True, True, True, False]}


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.19, 1), (0.21, 2), (0.99, 2), (1 - 2**-53, 2)])
def test_a_draw_is_a_place_among_the_added_probabilities(number: float, token: int) -> None:
    scores = torch.tensor([[-math.inf, math.log(0.2), math.log(0.8), -math.inf]])
    assert choose_tokens(scores, Sampling(temperature=1.0), [number]).tolist() == [token]


def test_a_draw_is_its_hash() -> None:
    """Of 7, 2 and 1 as three little-endian numbers of eight bytes."""
    message = b"\x07" + bytes(7) + b"\x02" + bytes(7) + b"\x01" + bytes(7)
    bits = int(hashlib.blake2b(message, digest_size=8).hexdigest(), 16) >> 11
    assert draw(7, 2, 1) == bits / 2**53
    assert len({draw(*numbers) for numbers in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))}) == 4


def test_tokens_come_as_often_as_they_are_probable() -> None:
    """40,000 draws: a frequency is off by more than 0.01 with a probability below 1e-4; the seed is fixed."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    draws = [draw(3, question, position) for question in range(200) for position in range(200)]
    scores = probabilities.log().expand(len(draws), -1)
    found = choose_tokens(scores, Sampling(temperature=1.0), draws).bincount(minlength=4) / len(draws)
    assert torch.allclose(found, probabilities, atol=0.01)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature -0.1: expected a number from 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0: expected a number above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"top_p": 0.5}, "top_p 0.5 has no effect at temperature 0"),
        ({"top_k": 5}, "top_k 5 has no effect at temperature 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("^", r"\^")):
        Sampling(**values)
