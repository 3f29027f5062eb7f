"""Greedy generation with a key-value cache, on any tensor x pipeline x data layout.

Prompts of a batch are padded on the left, so that the last position predicts the next token of every prompt. One
forward pass reads the prompts (images included) and fills the cache; then each pass feeds one token. Stages run one
after the other, and each sends its output to the next, so a virtual pipeline works too. Data-parallel ranks take
prompts in turn.

Of equal logits the lowest id is chosen, at any layout. In fp32 the tokens equal those of recomputing the whole sequence
for each token. In bf16 a pass over one token rounds differently than one over the sequence, so tokens may differ where
logits are that close.

The layers are those of the local backend, whose attention takes a mask for the padding. Sequence parallelism is off: a
pass over one token has nothing to split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_vl.backends.attention_inputs import AttentionInputs
from megatron_vl.backends.local.attention import LocalInputs
from megatron_vl.checkpoint.inference import load_for_inference
from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.errors import NotFiniteError
from megatron_vl.model.fusion import fuse
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.model.rotary import LongContext
from megatron_vl.parallel.agreement import by_all
from megatron_vl.parallel.collectives import from_last_stage, receive, send
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.layout import PipelineLayout, resolve_layout

_NOT_A_TOKEN = -1


@dataclass(frozen=True)
class Prompt:
    """Token ids with image slots, and the images that fill them."""

    tokens: tuple[int, ...]
    pixels: Tensor | None = None
    """uint8[k, 3, H, W], one for each image span of ``tokens``."""


@dataclass(frozen=True)
class GenerationOptions:
    """When to stop, and which tokens are excluded."""

    max_new_tokens: int = 64
    batch_size: int = 32
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end an answer and are not part of it; <|endoftext|> always is one."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that are never chosen."""


@dataclass(frozen=True)
class _PaddedBatch:
    tokens: Tensor
    """int64[b, longest], padded on the left."""
    padding: Tensor
    """bool[b, longest]."""
    slots: Tensor
    """int64[images * queries]: positions of image slots in the flattened batch."""
    pixels: Tensor | None


@dataclass(frozen=True)
class _Pass:
    """One pass of all stages."""

    tokens: Tensor
    """int64[b, s], the new tokens."""
    inputs: AttentionInputs
    prompts: _PaddedBatch | None
    """On the first pass, which also reads the images."""

    @property
    def pixels(self) -> Tensor | None:
        return None if self.prompts is None else self.prompts.pixels


class Engine:
    """A model that generates answers."""

    def __init__(self, chunks: Sequence[QwenVL], config: RunConfig, topology: Topology) -> None:
        """Take ``chunks``, which must have been built without sequence parallelism, from the local backend."""
        assert not config.parallel.sequence_parallel and config.parallel.backend == "local"
        self.chunks = list(chunks)
        self.topology = topology
        self.layout: PipelineLayout = resolve_layout(config)
        self.model = config.model
        self.special = SpecialTokens(config.model.num_bpe_tokens)
        self._long_context = LongContext(config.model.language)
        self._dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        for chunk in self.chunks:
            chunk.eval()

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

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], options: GenerationOptions) -> list[list[int]]:
        """Return the new tokens of each prompt, in the order of the prompts, on every rank.

        Raises:
            NotFiniteError: on every rank, if the logits of a prompt are not numbers.
        """
        gathered = by_all(lambda: self._answer_own(prompts, options))
        merged = {index: tokens for own in gathered for index, tokens in own.items()}
        return [merged[index] for index in range(len(prompts))]

    def _answer_own(self, prompts: Sequence[Prompt], options: GenerationOptions) -> dict[int, list[int]]:
        """Return the answers to the prompts of this data-parallel rank, by index. All ranks of a replica fail alike."""
        answers: dict[int, list[int]] = {}
        for indices in self._batches(prompts, options.batch_size):
            batch = self._answer([prompts[index] for index in indices], options)
            answers.update(zip(indices, batch, strict=True))
        return answers

    def _batches(self, prompts: Sequence[Prompt], size: int) -> list[list[int]]:
        """Return this rank's prompts by their index, batched by length so that there is little padding.

        A prompt whose length changes the rotary base (those above some length) is in a batch of its own, so its answer
        does not depend on other prompts.
        """
        mine = range(self.topology.dp_rank, len(prompts), self.topology.dp_size)
        by_length = sorted(mine, key=lambda index: (len(prompts[index].tokens), index))
        plain = [i for i in by_length if self._long_context.ntk_alpha(len(prompts[i].tokens)) == 1]
        batches = [plain[start : start + size] for start in range(0, len(plain), size)]
        return batches + [[index] for index in by_length[len(plain) :]]

    def _answer(self, prompts: Sequence[Prompt], options: GenerationOptions) -> list[list[int]]:
        batch = self._pad(prompts)
        stops = ((self.special.endoftext,), *options.stop_sequences)
        number, length = batch.tokens.shape
        caches = [StaticInferenceContext(number, length + options.max_new_tokens) for _ in self.chunks]
        answers: list[list[int]] = [[] for _ in range(number)]
        finished = [False] * number
        padding = batch.padding
        first = _Pass(batch.tokens, self._attention_inputs(length, padding, prompt=length), batch)
        newest = self._forward(first, caches, banned_ids=options.banned_ids)
        for produced in range(1, options.max_new_tokens + 1):
            for index, token in enumerate(newest.tolist()):
                if not finished[index]:
                    answers[index].append(token)
                    finished[index] = _cut_stop(answers[index], stops)
            if all(finished) or produced == options.max_new_tokens:
                break
            padding = torch.cat([padding, padding.new_zeros(number, 1)], dim=1)
            one_more = _Pass(newest[:, None], self._attention_inputs(1, padding, prompt=length), None)
            newest = self._forward(one_more, caches, banned_ids=options.banned_ids)
        return answers

    def _pad(self, prompts: Sequence[Prompt]) -> _PaddedBatch:
        longest, device = max(len(prompt.tokens) for prompt in prompts), self.topology.device
        tokens = torch.full((len(prompts), longest), self.special.endoftext, dtype=torch.int64)
        padding = torch.ones_like(tokens, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            padding[row, longest - len(prompt.tokens) :] = False
        slots = torch.nonzero(tokens.flatten() == self.special.img_pad).flatten()
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        return _PaddedBatch(
            tokens.to(device), padding.to(device), slots.to(device), torch.cat(pixels).to(device) if pixels else None
        )

    def _forward(self, this: _Pass, caches: Sequence[StaticInferenceContext], *, banned_ids: Sequence[int]) -> Tensor:
        """Run all stages; return int64[b], the next tokens, on every rank."""
        reads_text = next(index for index, stage in enumerate(self.layout.stages) if stage.word_embedding)
        state: Tensor | None = None
        for index in range(0 if this.pixels is not None else reads_text, len(self.layout.stages)):
            owner = index % self.layout.pipeline_size
            if owner == self.topology.pp_rank:
                chunk = index // self.layout.pipeline_size
                state = self._run_stage(self.chunks[chunk], this, state, cache=caches[chunk])
            if index + 1 < len(self.layout.stages):
                state = self._hand_over(state, owner, (index + 1) % self.layout.pipeline_size)
        number, length = this.tokens.shape
        for cache in caches:
            cache.sequence_len_offset += length
            cache.enable_decode_mode()
        newest = torch.zeros(number, dtype=torch.int64, device=this.tokens.device)
        if self.topology.on_last_stage:
            assert state is not None
            state[:, list(banned_ids)] = float("-inf")
            newest = state.argmax(-1).masked_fill(state.isnan().any(-1), _NOT_A_TOKEN)
        from_last_stage(newest, topology=self.topology)
        if bool((newest == _NOT_A_TOKEN).any()):
            raise NotFiniteError("the model's logits are not numbers: its weights are damaged, or have diverged")
        return newest

    def _hand_over(self, state: Tensor | None, owner: int, following: int) -> Tensor | None:
        """Send a stage's output to the following stage if another rank holds that."""
        if owner == following:
            return state
        if self.topology.pp_rank == owner:
            assert state is not None
            send(state, following, topology=self.topology)
        elif self.topology.pp_rank == following:
            return receive(owner, dtype=self._dtype, topology=self.topology)
        return None

    def _run_stage(
        self, chunk: QwenVL, this: _Pass, state: Tensor | None, *, cache: StaticInferenceContext
    ) -> Tensor | None:
        if this.pixels is not None:
            state = chunk.see(state, this.pixels)
        language = chunk.language_model
        if language is None:
            return state
        number, length = this.tokens.shape
        if chunk.stage.word_embedding:
            line = language.embed(this.tokens.flatten())
            if this.prompts is not None and state is not None:
                images = torch.arange(state.shape[1], device=line.device)
                line = fuse(line, state, slots=this.prompts.slots, span_images=images)
            state = line.view(number, length, -1).transpose(0, 1).contiguous()
        state = language(state, this.inputs, inference=cache)
        if chunk.stage.head:
            everyone = torch.arange(number, device=state.device)
            logits = language.logits(state[-1:].transpose(0, 1), positions=everyone)
            state = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return state

    def _attention_inputs(self, new: int, padding: Tensor, *, prompt: int) -> AttentionInputs:
        """Return the mask of ``new`` queries over all keys so far, and the angles of all positions.

        The length of the ``prompt`` sets the rotary base, also for the tokens that follow it. The scale of a query
        depends on its index in its own sequence, without padding.

        Args:
            padding: bool[b, keys]: padding.
        """
        keys = padding.shape[1]
        future = torch.ones(new, keys, dtype=torch.bool, device=padding.device).triu(keys - new + 1)
        mask = future | padding[:, None, None, :]
        # A padding query would attend to nothing, and its softmax would be NaN: let it attend to itself.
        itself = torch.eye(new, dtype=torch.bool, device=padding.device)
        mask[..., keys - new :] &= ~itself
        language = next((chunk.language_model for chunk in self.chunks if chunk.language_model is not None), None)
        rotary = None if language is None else language.angles(keys, padding.device, read=prompt)
        packed = None
        if self._long_context.needed(keys):
            indices = torch.arange(keys - new, keys, device=padding.device)[:, None] - padding.sum(1)
            scale = self._long_context.query_scale(indices)
            packed = LocalInputs(query_scale=None if scale is None else scale[..., None, None])
        return AttentionInputs(mask=mask, rotary=rotary, packed=packed)


def _cut_stop(answer: list[int], stops: Sequence[tuple[int, ...]]) -> bool:
    """Return whether an answer ends in one of ``stops``; remove that stop sequence."""
    for stop in stops:
        if tuple(answer[-len(stop) :]) == stop:
            del answer[-len(stop) :]
            return True
    return False
