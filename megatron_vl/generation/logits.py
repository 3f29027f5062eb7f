"""The steps of ``sampling.py``, on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vl.generation.sampling import Sampling


def process_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return float32[b, v], the logits after the steps of the module; minus infinity for tokens that are left out.

    Args:
        logits: [b, v].
        seen: bool[b, v], which tokens each prompt and answer holds; needed for a repetition penalty.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        assert seen is not None
        penalized = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
        scores = torch.where(seen, penalized, scores)
    if sampling.greedy:
        return scores
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    return _keep_top_p(scores, sampling.top_p) if sampling.top_p < 1 else scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    out = before >= top_p
    out[:, 0] = False
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, ids, out), -math.inf)


def choose_tokens(scores: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """Return int64[b], a token of each row of what :func:`process_logits` returns.

    Args:
        scores: float32[b, v].
        sampling: that of the scores.
        draws: a number in [0, 1) for each row, from :func:`draw`; not used if nothing is drawn.
    """
    if sampling.greedy:
        return scores.argmax(-1)
    sums = scores.double().softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    goal = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None] * total
    last = (sums < total).sum(-1, keepdim=True)  # where rounding would lead beyond every token
    return torch.minimum(torch.searchsorted(sums, goal, right=True), last).squeeze(-1)
