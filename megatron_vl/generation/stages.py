"""Run all pipeline stages of a model once, in evaluation mode, at any tensor x pipeline layout.

Stages run one after the other, and each sends its output to the next, so a virtual pipeline works too. The layers are
those of the local backend, whose attention takes a mask for the padding. Sequence parallelism is off: a pass over one
token has nothing to split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_vl.backends.attention_inputs import AttentionInputs
from megatron_vl.backends.local.attention import LocalInputs
from megatron_vl.config.schema import RunConfig
from megatron_vl.generation.batches import PaddedBatch
from megatron_vl.model.fusion import fuse
from megatron_vl.model.language import LanguageModel
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.model.rotary import LongContext
from megatron_vl.parallel.collectives import receive, send
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.layout import PipelineLayout, resolve_layout


@dataclass(frozen=True)
class Targets:
    """Tokens whose probability is asked for, instead of logits."""

    positions: Tensor
    """int64[m], of the flattened batch [b, s]: the positions that predict them."""
    tokens: Tensor
    """int64[m]."""


@dataclass(frozen=True)
class Pass:
    """One pass of all stages."""

    tokens: Tensor
    """int64[b, s], the new tokens."""
    inputs: AttentionInputs
    prompts: PaddedBatch | None
    """On the first pass, which also reads the images."""
    targets: Targets | None = None

    @property
    def sees(self) -> bool:
        """Whether the vision part runs."""
        return self.prompts is not None and self.prompts.has_images


class StagedModel:
    """The model chunks of this rank, and their place in the pipeline."""

    def __init__(self, chunks: Sequence[QwenVL], config: RunConfig, topology: Topology) -> None:
        """Take ``chunks``, which must have been built without sequence parallelism, from the local backend."""
        assert not config.parallel.sequence_parallel and config.parallel.backend == "local"
        self.chunks = list(chunks)
        self.long_context = LongContext(config.model.language)
        self._topology = topology
        self._layout: PipelineLayout = resolve_layout(config)
        self._dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        for chunk in self.chunks:
            chunk.eval()

    @property
    def decodes_images(self) -> bool:
        """Whether this rank needs pixels."""
        return any(chunk.vision is not None and chunk.vision.has_patch_embed for chunk in self.chunks)

    def run(self, this: Pass, caches: Sequence[StaticInferenceContext | None]) -> Tensor | None:
        """Run all stages; each chunk has a cache.

        Returns:
            On the last stage the logits [b, padded vocabulary] of the last position, or, if the pass has targets, the
            cross-entropy float32[m] of each. Elsewhere anything.
        """
        stages, size = self._layout.stages, self._layout.pipeline_size
        reads_text = next(index for index, stage in enumerate(stages) if stage.word_embedding)
        state: Tensor | None = None
        for index in range(0 if this.sees else reads_text, len(stages)):
            owner, number = index % size, index // size
            if owner == self._topology.pp_rank:
                state = self._run_stage(self.chunks[number], this, state, cache=caches[number])
            if index + 1 < len(stages):
                state = self._hand_over(state, owner, (index + 1) % size)
        for cache in caches:
            if cache is not None:
                cache.sequence_len_offset += this.tokens.shape[1]
                cache.enable_decode_mode()
        return state

    def _hand_over(self, state: Tensor | None, owner: int, following: int) -> Tensor | None:
        """Send a stage's output to the following stage if another rank holds that."""
        if owner == following:
            return state
        if self._topology.pp_rank == owner:
            assert state is not None
            send(state, following, topology=self._topology)
        elif self._topology.pp_rank == following:
            return receive(owner, dtype=self._dtype, topology=self._topology)
        return None

    def _run_stage(
        self, chunk: QwenVL, this: Pass, state: Tensor | None, *, cache: StaticInferenceContext | None
    ) -> Tensor | None:
        if this.sees:
            assert this.prompts is not None
            state = chunk.see(state, this.prompts.pixels)
        language = chunk.language_model
        if language is None:
            return state
        number, length = this.tokens.shape
        if chunk.stage.word_embedding:
            line = language.embed(this.tokens.flatten())
            if this.prompts is not None and state is not None:
                line = fuse(line, state, slots=this.prompts.slots, span_images=this.prompts.span_images)
            state = line.view(number, length, -1).transpose(0, 1).contiguous()
        state = language(state, this.inputs, inference=cache)
        return _run_head(language, state, this.targets) if chunk.stage.head else state

    def attention_inputs(self, new: int, padding: Tensor, *, read: int) -> AttentionInputs:
        """Return the mask of ``new`` queries over all keys so far, and the angles of all positions.

        The number of tokens that were ``read`` at once sets the rotary base, also for the tokens that follow them. The
        scale of a query depends on its index in its own sequence, without padding.

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
        rotary = None if language is None else language.angles(keys, padding.device, read=read)
        packed = None
        if self.long_context.needed(keys):
            indices = torch.arange(keys - new, keys, device=padding.device)[:, None] - padding.sum(1)
            scale = self.long_context.query_scale(indices)
            packed = LocalInputs(query_scale=None if scale is None else scale[..., None, None])
        return AttentionInputs(mask=mask, rotary=rotary, packed=packed)


def _run_head(language: LanguageModel, hidden: Tensor, targets: Targets | None) -> Tensor:
    """Return what :meth:`StagedModel.run` does, from [s, b, h]."""
    batch_first = hidden.transpose(0, 1)
    if targets is not None:
        line = batch_first.reshape(-1, 1, hidden.shape[-1])
        return language.token_losses(line, positions=targets.positions, targets=targets.tokens)
    newest = batch_first[:, -1:]
    logits = language.logits(newest, positions=torch.arange(len(newest), device=hidden.device))
    gathered: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return gathered
