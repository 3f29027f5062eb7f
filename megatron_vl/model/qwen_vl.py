"""Qwen-VL: one stage of the pipeline ``[patch embedding, V .. V, R] [word embedding + fusion, L .. L, norm, head]``.

A chunk holds the consecutive units that its :class:`StageLayout` names and nothing else. Its output is always
three-dimensional, so that Megatron-Core's schedules can send it: patches [p, n, w], features [q, n, h], or the packed
sequence [t, 1, h].

Frozen units at the start of the pipeline (recipe stage 3 freezes the vision tower) run without an autograd graph. A
pipeline stage after them owes its predecessor no gradient, but the schedule always sends one. It is set in advance to a
single zero, so the memory of the input is free at once and the message has a few bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.model.context import BuildContext
from megatron_vl.model.fusion import fuse
from megatron_vl.model.language import LanguageModel
from megatron_vl.model.resampler import Resampler
from megatron_vl.model.vision import VisionTower
from megatron_vl.planning.layout import StageLayout


class QwenVL(MegatronModule):
    """The units of one (virtual) pipeline stage."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(self, context: BuildContext, stage: StageLayout, *, vp_stage: int | None = None) -> None:
        super().__init__(config=context.core.schedule)
        self.stage = stage
        self.groups = context.groups
        self.vp_stage = vp_stage
        self.pre_process = stage.patch_embed
        self.post_process = stage.head
        self.vision = VisionTower(context, stage) if stage.patch_embed or stage.vision_layers else None
        self.resampler = Resampler(context) if stage.resampler else None
        has_language = stage.word_embedding or stage.language_layers or stage.head
        self.language_model = LanguageModel(context, stage) if has_language else None
        # What ``model/freeze.py`` sets:
        self.frozen_before = False
        """Whether nothing before this stage trains, so its input needs no gradient."""
        self.frozen_vision = False
        """Whether the vision tower is frozen."""
        self.frozen_resampler = False
        """Whether the resampler, and all before it, is frozen."""
        self.make_weights_whole: Callable[[], None] = lambda: None
        """Gathers the weights before they are read outside a forward pass; all data-parallel ranks call it together."""
        self._received: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None] | Tensor | None) -> None:
        """Take what the previous stage sent, None on the first stage. The schedule calls this."""
        self._received = received[0] if isinstance(received, list) else received

    def forward(self, batch: MicroBatch, features: Tensor | None = None) -> Tensor:
        """Run this stage on a micro-batch. A stage does only those of the following steps whose units it holds.

        ``features`` [queries, n, h] is what :meth:`see` has returned for the images on other ranks (``vision_parallel
        data``). It takes the place of steps 2 and 3.

        1. Take the input that the previous stage sent.
        2. Encode the images in the vision tower: [n, 3, H, W] -> [patches, n, w].
        3. Compress the patches in the resampler: [patches, n, w] -> [queries, n, h].
        4. Embed the tokens, and write the image features into their slots: int64[t] -> [t, 1, h].
        5. Run the language layers on the packed sequence [t, 1, h].
        6. Compute the head and the loss on the supervised positions: [t, 1, h] -> float32[m].
        7. Free the input if no gradient returns through it.

        Under sequence parallelism a rank holds t / tp and patches / tp.

        Returns:
            On the last stage float32[m], the loss of each supervised position; elsewhere the input of the next stage.
        """
        hidden, release = self._take_input()
        hidden = self.see(hidden, batch.pixels) if features is None else features
        if self.language_model is not None:
            hidden = self._run_language(self.language_model, hidden, batch)
        release()
        return hidden if self.stage.head else _ready_to_send(hidden)

    def see(self, hidden: Tensor | None, pixels: Tensor | None) -> Tensor:
        """Run the vision part of the stage, steps 2 and 3, on pixels or on what the previous stage sent."""
        if self.vision is not None:
            with _graph_unless(self.frozen_vision):
                hidden = self.vision(pixels if self.vision.has_patch_embed else hidden)
        if self.resampler is not None:
            with _graph_unless(self.frozen_resampler):
                hidden = self.resampler(hidden)
        assert hidden is not None
        return hidden

    def _run_language(self, language: LanguageModel, hidden: Tensor, batch: MicroBatch) -> Tensor:
        if self.stage.word_embedding:
            # No name holds the embedded tokens: they are free once the features are among them.
            hidden = fuse(language.embed(batch.tokens), hidden, slots=batch.slots, span_images=batch.span_images)
            hidden = language.scatter(hidden)
        if self.stage.language_layers:
            line = PackedLine(batch.span_lengths, batch.cu_seqlens, batch.positions)
            hidden = language(hidden, language.attention_inputs(line))
        if self.stage.head:
            hidden = language.token_losses(hidden, positions=batch.supervised, targets=batch.targets)
        return hidden

    def _take_input(self) -> tuple[Tensor | None, Callable[[], None]]:
        """Return the received tensor, and a function that frees its memory; call it after the last use."""
        received = self._received
        if received is None or not (self.frozen_before and received.requires_grad and torch.is_grad_enabled()):
            return received, lambda: None

        def release() -> None:
            received.data = received.data.new_zeros(1, 1, 1)
            received.grad = received.data.new_zeros(1, 1, 1)

        return received.detach(), release

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return every tensor of this stage under its global name, which no layout changes."""
        self.make_weights_whole()
        metadata = {"dp_cp_group": self.groups.dp_cp} | (metadata or {})
        result: dict[str, Any] = {}
        for name, part in self.named_children():
            result.update(part.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return result


def _graph_unless(frozen: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if frozen else contextlib.nullcontext()


def _ready_to_send(hidden: Tensor) -> Tensor:
    """Return a contiguous tensor that is not a view. The schedule frees a sent tensor's memory, which views prevent."""
    output: Tensor = make_viewless_tensor(hidden.contiguous(), requires_grad=hidden.requires_grad, keep_graph=True)
    return output
