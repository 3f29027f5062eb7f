"""Above the native length, evaluation and generation compute as the published model does, and training does not.

Against the formulas in fp32: max |difference| <= 2e-5 x max |reference| for logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.ranks import RankPools
from tests.parallel.long_context import (
    NATIVE,
    Reference,
    answers_on_rank,
    evaluated_loss_on_rank,
    long_config,
    packed,
    packed_logits_on_rank,
    random_tokens,
    reference_on_rank,
    scores_on_rank,
    step_after_evaluation_on_rank,
    with_language,
)

SPANS = [5, NATIVE, NATIVE + 1, 2 * NATIVE, 2 * NATIVE + 1, 4 * NATIVE, 4 * NATIVE + 6, 3]
PROMPTS = [3, NATIVE - 2, NATIVE, NATIVE + 1, 2 * NATIVE - 1, 2 * NATIVE, 3 * NATIVE, 4 * NATIVE + 1, 7]
PLAIN = {"use_dynamic_ntk": False, "use_logn_attn": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-vp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def _world_size(parallel: dict[str, Any]) -> int:
    return int(parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1))


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def reference(ranks: RankPools) -> Reference:
    found: Reference = ranks(1).run(reference_on_rank, long_config())[0]
    return found


@pytest.fixture(scope="module")
def span_logits(reference: Reference) -> list[Tensor]:
    return [reference.logits(text) for text in random_tokens(SPANS)]


def test_each_span_of_a_packed_line_has_its_own_length(ranks: RankPools, span_logits: list[Tensor]) -> None:
    batch = packed(random_tokens(SPANS))
    found = ranks(1).run(packed_logits_on_rank, long_config(), batch, False)[0].split(SPANS)
    plain = ranks(1).run(packed_logits_on_rank, long_config(), batch, True)[0].split(SPANS)
    for length, ours, expected, trained in zip(SPANS, found, span_logits, plain, strict=True):
        _assert_close(ours, expected)
        if length <= NATIVE:
            assert torch.equal(ours, trained)
        else:
            assert (ours - trained).abs().max() > 1e-3 * expected.abs().max(), "the difference can be seen"


@pytest.mark.parametrize("training", [True, False])
def test_up_to_the_native_length_nothing_changes_a_bit(ranks: RankPools, training: bool) -> None:
    batch = packed(random_tokens(SPANS))
    found = []
    for fields in ({"native_seq_length": max(SPANS)}, PLAIN):
        config = replace(long_config(), model=with_language(**fields))
        found.append(ranks(1).run(packed_logits_on_rank, config, batch, training)[0])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "parallel",
    [{}, *LAYOUTS.values(), LAYOUTS["tp2"] | {"sequence_parallel": True}],
    ids=["one", *LAYOUTS, "tp2-sp"],
)
def test_validation_loss_equals_the_reference(
    ranks: RankPools, span_logits: list[Tensor], parallel: dict[str, Any]
) -> None:
    texts = random_tokens(SPANS)
    logits = torch.cat([logits[:-1] for logits in span_logits])
    expected = F.cross_entropy(logits, torch.tensor([token for text in texts for token in text[1:]])).item()
    config, batch = long_config(parallel=parallel), packed(texts)
    for found in ranks(_world_size(parallel)).run(evaluated_loss_on_rank, config, batch):
        assert found == pytest.approx(expected, rel=2e-6)


def test_training_is_free_of_it_whatever_ran_before(ranks: RankPools) -> None:
    batch = packed(random_tokens([3 * NATIVE, 40]))
    fresh = ranks(1).run(step_after_evaluation_on_rank, long_config(), batch, False)[0]
    after = ranks(1).run(step_after_evaluation_on_rank, long_config(), batch, True)[0]
    plain_config = replace(long_config(), model=with_language(**PLAIN))
    plain = ranks(1).run(step_after_evaluation_on_rank, plain_config, batch, False)[0]
    assert abs(after.evaluated - after.loss) > 1e-4 * after.loss
    for other in (after, plain):
        assert other.loss == fresh.loss
        assert all(torch.equal(other.gradients[name], gradient) for name, gradient in fresh.gradients.items())


@pytest.fixture(scope="module")
def expected_answers(reference: Reference) -> list[tuple[list[int], Tensor]]:
    return [reference.answer(text) for text in random_tokens(PROMPTS, seed=1)]


def test_cached_decoding_equals_the_reference(
    ranks: RankPools, expected_answers: list[tuple[list[int], Tensor]]
) -> None:
    """One prompt at a time, logits of every new token."""
    for text, (tokens, logits) in zip(random_tokens(PROMPTS, seed=1), expected_answers, strict=True):
        answers, passes = ranks(1).run(answers_on_rank, long_config(), [text], 1)[0]
        found = torch.cat(passes)[:, : logits.shape[1]]
        shown = logits.isfinite()
        _assert_close(found[shown], logits[shown])
        assert answers == [tokens]


@pytest.mark.parametrize("parallel", [{}, *LAYOUTS.values()], ids=["one", *LAYOUTS])
def test_answers_do_not_depend_on_company_or_layout(
    ranks: RankPools, expected_answers: list[tuple[list[int], Tensor]], parallel: dict[str, Any]
) -> None:
    texts = random_tokens(PROMPTS, seed=1)
    for answers, _ in ranks(_world_size(parallel)).run(answers_on_rank, long_config(parallel=parallel), texts, 4):
        assert answers == [tokens for tokens, _ in expected_answers]


def test_the_answers_above_the_native_length_are_not_the_plain_model_s(
    ranks: RankPools, expected_answers: list[tuple[list[int], Tensor]]
) -> None:
    texts, config = random_tokens(PROMPTS, seed=1), replace(long_config(), model=with_language(**PLAIN))
    plain = [ranks(1).run(answers_on_rank, config, [text], 1)[0][1] for text in texts]
    for length, passes, (_, logits) in zip(PROMPTS, plain, expected_answers, strict=True):
        found, shown = torch.cat(passes)[:, : logits.shape[1]], logits.isfinite()
        first = (found - logits)[0][shown[0]].abs().max() / logits[shown].abs().max()
        assert (first > 1e-3) == (length > NATIVE), "prompts up to the native length begin the same"


def test_each_continuation_is_scored_with_the_base_of_its_own_length(ranks: RankPools, reference: Reference) -> None:
    prompt, ends = 2 * NATIVE - 2, (2 * NATIVE, 2 * NATIVE + 3)
    (text,) = random_tokens([ends[-1]], seed=4)
    found = ranks(1).run(scores_on_rank, long_config(), text, prompt, ends)[0]
    for values, end in zip(found, ends, strict=True):
        exact = reference.logits(text[:end]).log_softmax(-1)
        expected = [float(exact[place - 1, text[place]]) for place in range(prompt, end)]
        assert values == pytest.approx(expected, abs=5e-5)
