"""Choose the next token of each row of a batch, the same on every rank of a replica.

The first rank of the last stage chooses, and the others are told. Two ranks that computed a sum over the vocabulary in
another order could draw different tokens, and would then read different texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vl.errors import NotFiniteError
from megatron_vl.generation.batches import PaddedBatch
from megatron_vl.generation.logits import choose_tokens, process_logits
from megatron_vl.generation.requests import GenerationOptions
from megatron_vl.generation.sampling import draw
from megatron_vl.parallel.collectives import from_head
from megatron_vl.parallel.topology import Topology

_NOT_A_TOKEN = -1


class Chooser:
    """Chooses the tokens of one batch, and remembers which tokens each row holds if there is a repetition penalty."""

    def __init__(
        self, batch: PaddedBatch, numbers: Sequence[int], options: GenerationOptions, topology: Topology
    ) -> None:
        """Take the prompts, and the numbers of their questions."""
        self._batch, self._numbers, self._options, self._topology = batch, numbers, options, topology
        self._seen: Tensor | None = None
        """bool[b, padded vocabulary], on the last stage."""

    def choose(self, logits: Tensor | None, *, position: int) -> Tensor:
        """Return int64[b], the next tokens, on every rank.

        Args:
            logits: [b, padded vocabulary] on the last stage; ignored elsewhere.
            position: number of tokens chosen before.

        Raises:
            NotFiniteError: on every rank, if logits are not numbers.
        """
        newest = torch.zeros(len(self._numbers), dtype=torch.int64, device=self._batch.tokens.device)
        if self._topology.on_last_stage:
            assert logits is not None
            newest = self._choose(logits, position).masked_fill(~(logits < float("inf")).all(-1), _NOT_A_TOKEN)
        from_head(newest, topology=self._topology)
        if bool((newest == _NOT_A_TOKEN).any()):
            raise NotFiniteError("the model's logits are not numbers: its weights are damaged, or have diverged")
        if self._seen is not None:
            self._seen.scatter_(1, newest[:, None], value=True)
        return newest

    def _choose(self, logits: Tensor, position: int) -> Tensor:
        sampling = self._options.sampling
        if sampling.repetition_penalty != 1 and self._seen is None:
            self._seen = _tokens_in(self._batch, logits.shape[-1])
        logits = logits.clone()
        logits[:, list(self._options.banned_ids)] = float("-inf")
        scores = process_logits(logits, sampling, self._seen)
        draws = [draw(sampling.seed, number, position) for number in self._numbers]
        return choose_tokens(scores, sampling, draws)


def _tokens_in(batch: PaddedBatch, vocabulary: int) -> Tensor:
    """Return bool[b, vocabulary], which tokens each prompt holds; padding is none of them."""
    counts = torch.zeros(len(batch.tokens), vocabulary, dtype=torch.int32, device=batch.tokens.device)
    return counts.scatter_add_(1, batch.tokens, (~batch.padding).int()) > 0
