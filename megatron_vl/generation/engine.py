"""Answers and log-likelihoods from a model with a key-value cache, on any tensor x pipeline x data layout.

Requests are an iterable, and answers an iterator in the same order, so neither has to fit in memory. A few batches of
requests are taken at a time (``batches.py``). Data-parallel ranks take these batches in turn, and then exchange the
answers. Every rank must be given the same requests, and gets all answers.

Of a batch, one forward pass reads the prompts (images included) and fills the cache; then each pass feeds one token.
How a token is chosen from the logits is in ``sampling.py``. The first rank of the last stage chooses for its replica.

In fp32 the tokens equal those of recomputing the whole sequence for each token, whatever the batch and the layout. In
bf16 a pass over one token rounds differently than one over the sequence, so tokens may differ where logits are that
close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_vl.checkpoint.inference import load_for_inference
from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.errors import NotFiniteError, SkipSample
from megatron_vl.generation.batches import PaddedBatch, Row, batches_by_length, pad_rows, windows
from megatron_vl.generation.choosing import Chooser
from megatron_vl.generation.requests import Answer, Choices, GenerationOptions, Likelihoods, Request
from megatron_vl.generation.stages import Pass, StagedModel, Targets
from megatron_vl.generation.stops import cut_stop_sequence
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.agreement import by_all, together
from megatron_vl.parallel.collectives import first_of_replica, from_last_stage
from megatron_vl.parallel.topology import Topology

_WINDOW = 4
"""Number of batches of each data-parallel rank that are formed together."""
A = TypeVar("A", Request, Choices)
B = TypeVar("B", Answer, Likelihoods)


@dataclass(frozen=True)
class _Decoded:
    """The requests of a batch whose images could be used, and their images."""

    usable: tuple[int, ...]
    """Their indices in the batch."""
    skipped: dict[int, str]
    """The reasons of the others."""
    pixels: Tensor | None


class Engine:
    """A model that answers."""

    def __init__(self, chunks: Sequence[QwenVL], config: RunConfig, topology: Topology) -> None:
        """Take ``chunks``, which must have been built without sequence parallelism, from the local backend."""
        self.staged = StagedModel(chunks, config, topology)
        self.topology = topology
        self.model = config.model
        self.special = SpecialTokens(config.model.num_bpe_tokens)

    @classmethod
    def from_checkpoint(cls, path: Path, *, parallel: ParallelConfig, topology: Topology, bf16: bool = False) -> Engine:
        """Load the weights of a checkpoint at any layout.

        Raises:
            CheckpointError: if there is no usable checkpoint at ``path``.
            ConfigError: if its model cannot be split over this layout.
        """
        own = replace(parallel, sequence_parallel=False, backend="local")
        training = TrainingConfig(bf16=bf16)
        loaded = load_for_inference(path, lambda saved: replace(saved, parallel=own, training=training), topology)
        return cls(loaded.chunks, loaded.config, topology)

    @property
    def chunks(self) -> list[QwenVL]:
        """The model chunks of this rank."""
        return self.staged.chunks

    @torch.no_grad()
    def generate(self, requests: Iterable[Request], options: GenerationOptions) -> Iterator[Answer]:
        """Yield the answer to each request, in their order, on every rank.

        Raises:
            NotFiniteError: on every rank, if the logits of a prompt are not numbers.
        """
        yield from self._in_turn(requests, options.batch_size, lambda batch: self._answer(batch, options))

    @torch.no_grad()
    def log_likelihoods(self, choices: Iterable[Choices], *, batch_size: int = 32) -> Iterator[Likelihoods]:
        """Yield the log-likelihoods of the continuations of each prompt, in their order, on every rank.

        A prompt and a continuation are one sequence, as in ``tools/forward.py``. An image is encoded once for all
        continuations of a prompt.

        Args:
            batch_size: prompts that are read together, each as often as it has continuations.

        Raises:
            NotFiniteError: on every rank, if the loss of a token is not a number.
        """
        yield from self._in_turn(choices, batch_size, self._score)

    def _in_turn(self, asked: Iterable[A], batch_size: int, work: Callable[[list[A]], list[B]]) -> Iterator[B]:
        """Yield the result of each item in order, as soon as those before it are there."""
        ranks = self.topology.dp_size
        remaining = windows(asked, batch_size * ranks * _WINDOW)
        while window := together(lambda: next(remaining, None)):
            lengths = [_length(item) for item in window]
            batches = batches_by_length(lengths, most=batch_size, ranks=ranks, stands_alone=self._changes_base)
            done: dict[int, B] = {}
            following = 0
            for first in range(0, len(batches), ranks):
                for found in self._work_on(batches[first : first + ranks], window, work):
                    done |= found
                while following in done:
                    yield done.pop(following)
                    following += 1

    def _work_on(
        self, batches: Sequence[list[int]], window: Sequence[A], work: Callable[[list[A]], list[B]]
    ) -> list[dict[int, B]]:
        """Work on at most one batch on each data-parallel rank; return the results of all ranks, by their index.

        All ranks of a replica fail alike.
        """
        own = batches[self.topology.dp_rank] if self.topology.dp_rank < len(batches) else []

        def results() -> dict[int, B]:
            return dict(zip(own, work([window[index] for index in own]), strict=True)) if own else {}

        return by_all(results)

    def _changes_base(self, length: int) -> bool:
        """Return whether a length changes the rotary base; then an answer must not depend on other prompts."""
        return self.staged.long_context.ntk_alpha(length) != 1

    def _decode(self, requests: Sequence[Request]) -> _Decoded:
        """Decode the images of a batch; the ranks of a replica agree on those that cannot be used."""
        pixels: dict[int, Tensor] = {}
        failed: dict[int, str] = {}
        for index, request in enumerate(requests):
            if request.pixels is not None and self.staged.decodes_images:
                try:
                    pixels[index] = request.pixels if isinstance(request.pixels, Tensor) else request.pixels()
                except SkipSample as error:
                    failed[index] = str(error)
        if any(request.pixels is not None for request in requests):
            failed = first_of_replica(failed, topology=self.topology)
        usable = tuple(index for index in range(len(requests)) if index not in failed)
        kept = [pixels[index] for index in usable if index in pixels]
        return _Decoded(usable, failed, torch.cat(kept) if kept else None)

    def _answer(self, requests: list[Request], options: GenerationOptions) -> list[Answer]:
        decoded = self._decode(requests)
        answers = {index: Answer(requests[index].number, skipped=why) for index, why in decoded.skipped.items()}
        if decoded.usable:
            asked = [requests[index] for index in decoded.usable]
            tokens = self._continue(asked, decoded.pixels, options)
            found = (Answer(request.number, tuple(new)) for request, new in zip(asked, tokens, strict=True))
            answers |= dict(zip(decoded.usable, found, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _continue(
        self, requests: Sequence[Request], pixels: Tensor | None, options: GenerationOptions
    ) -> list[list[int]]:
        """Return the new tokens of each prompt of a batch."""
        batch = self._pad([(request.tokens, (request.tokens,)) for request in requests], pixels)
        (number, length), padding = batch.tokens.shape, batch.padding
        chooser = Chooser(batch, [request.number for request in requests], options, self.topology)
        caches = [StaticInferenceContext(number, length + options.max_new_tokens) for _ in self.chunks]
        answers: list[list[int]] = [[] for _ in range(number)]
        finished = [False] * number
        this = Pass(batch.tokens, self.staged.attention_inputs(length, padding, read=length), batch)
        for position in range(options.max_new_tokens):
            newest = chooser.choose(self.staged.run(this, caches), position=position)
            for index, token in enumerate(newest.tolist()):
                if not finished[index]:
                    answers[index].append(token)
                    finished[index] = self._ends(answers[index], options)
            if all(finished) or position + 1 == options.max_new_tokens:
                break
            padding = torch.cat([padding, padding.new_zeros(number, 1)], dim=1)
            this = Pass(newest[:, None], self.staged.attention_inputs(1, padding, read=length), None)
        return answers

    def _ends(self, answer: list[int], options: GenerationOptions) -> bool:
        """Return whether an answer is complete; remove the stop sequence that has ended it."""
        if cut_stop_sequence(answer, ((self.special.endoftext,), *options.stop_sequences)):
            return True
        return options.stop_texts is not None and options.stop_texts.reached(answer)

    def _score(self, choices: list[Choices]) -> list[Likelihoods]:
        decoded = self._decode([item.request for item in choices])
        scores = {
            index: Likelihoods(choices[index].request.number, skipped=why) for index, why in decoded.skipped.items()
        }
        if decoded.usable:
            asked = [choices[index] for index in decoded.usable]
            alone = self._changes_base(max(map(_length, asked)))
            found = self._each_alone(asked[0], decoded.pixels) if alone else self._likelihoods(asked, decoded.pixels)
            scores |= dict(zip(decoded.usable, found, strict=True))
        return [scores[index] for index in range(len(choices))]

    def _each_alone(self, item: Choices, pixels: Tensor | None) -> list[Likelihoods]:
        """Return the log-likelihoods of continuations in passes of their own: each has the base of its own length."""
        passes = [self._likelihoods([replace(item, continuations=(one,))], pixels)[0] for one in item.continuations]
        return [Likelihoods(item.request.number, tuple(found.per_token[0] for found in passes))]

    def _likelihoods(self, asked: Sequence[Choices], pixels: Tensor | None) -> list[Likelihoods]:
        """Return the log-likelihoods of a batch, from one pass over every prompt with each of its continuations."""
        batch = self._pad([(item.request.tokens, _wholes(item)) for item in asked], pixels)
        length, device = batch.tokens.shape[1], batch.tokens.device
        endings = [ending for item in asked for ending in item.continuations]
        places = [
            row * length + length - 1 - len(ending) + place
            for row, ending in enumerate(endings)
            for place in range(len(ending))
        ]
        wanted = [token for ending in endings for token in ending]
        targets = Targets(torch.tensor(places, device=device), torch.tensor(wanted, device=device))
        inputs = self.staged.attention_inputs(length, batch.padding, read=length)
        losses = self.staged.run(Pass(batch.tokens, inputs, batch, targets), [None for _ in self.chunks])
        values = torch.zeros(len(wanted), device=device)
        if self.topology.on_last_stage:
            assert losses is not None
            values = -losses
        per_token = iter(from_last_stage(values, topology=self.topology).tolist())
        if values.isnan().any():
            raise NotFiniteError("the model's losses are not numbers: its weights are damaged, or have diverged")
        return [
            Likelihoods(
                item.request.number,
                tuple(tuple(next(per_token) for _ in ending) for ending in item.continuations),
            )
            for item in asked
        ]

    def _pad(
        self, prompts: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]], pixels: Tensor | None
    ) -> PaddedBatch:
        """Pad prompts and the rows that are made of each. All rows of a prompt have its images."""
        rows: list[Row] = []
        first = 0
        for prompt, wholes in prompts:
            images = tuple(range(first, first + prompt.count(self.special.img_start)))
            first += len(images)
            rows += [Row(whole, images) for whole in wholes]
        return pad_rows(rows, pixels, special=self.special, device=self.topology.device)


def _wholes(item: Choices) -> list[tuple[int, ...]]:
    return [(*item.request.tokens, *ending) for ending in item.continuations]


def _length(item: Request | Choices) -> int:
    """Return the number of tokens of the longest row of an item."""
    return len(item.tokens) if isinstance(item, Request) else max(map(len, _wholes(item)))
