"""The repetition of steps (``tests/helpers/repeats.py``) notices a step whose result is not always the same."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.language import LanguageModel
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config
from tests.parallel.gradients import step_on_rank


def step_that_drifts(start: Start, config: RunConfig, drift: float) -> bool:
    """Whether repetitions of a step are told apart whose head sees its input scaled by ``drift`` more each time."""
    token_losses = LanguageModel.token_losses
    count = iter(range(10**6))

    def drifting(self: LanguageModel, hidden: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        return token_losses(self, hidden * (1.0 + drift * next(count)), **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "token_losses", drifting)
        try:
            step_on_rank(start, config, micro_batches(config.model, 4))
        except AssertionError as error:
            return str(error).startswith("repetition 1")
        return False


@pytest.mark.parametrize("drift", [0.0, 1e-4])
def test_a_step_that_differs_is_noticed_on_every_rank(ranks: RankPools, drift: float) -> None:
    config = tiny_config(parallel={"pipeline_model_parallel_size": 2})
    assert ranks(2).run(step_that_drifts, config, drift) == [drift > 0.0] * 2
