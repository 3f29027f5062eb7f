"""The language model: the Qwen-7B body (``modeling_qwen.py``).

* RMSNorm before attention and MLP. Biases on q, k and v only. SwiGLU with the gate first. RoPE over all dimensions of a
  head in the half-split form. The output layer is not tied to the embedding.
* Rotary angles are computed in fp32 from each token's index within its attention span. In evaluation, spans above the
  native length get other angles and scaled queries (``model/rotary.py``). Training never changes them.
* The head runs on supervised positions only. That is exact, since no other position enters the loss. It saves work,
  since most of a row are image slots.
* Logits of rows that only pad the vocabulary to the tensor-parallel size are minus infinity.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.model.context import BuildContext, build_layers, run_layers
from megatron_vl.model.rotary import LongContext, rotary_angles
from megatron_vl.model.sharding import ShardedModule
from megatron_vl.planning.layout import StageLayout
from megatron_vl.planning.vocabulary import padded_vocab_size


class LanguageModel(ShardedModule):
    """The language layers of one stage, with embedding or head where the stage has them."""

    def __init__(self, context: BuildContext, stage: StageLayout) -> None:
        super().__init__(context.groups)
        language, config = context.model.language, context.core.language
        self.vocab_size = language.vocab_size
        self.dtype = config.params_dtype
        self.head_dim = language.hidden_size // language.num_attention_heads
        self.rotary_base = language.rotary_base
        self.long_context = LongContext(language)
        self.backend = context.backend
        self.sequence_parallel = context.sequence_parallel
        self.execution = context.execution(config)
        rows = padded_vocab_size(language.vocab_size, context.tensor_parallel_size)
        if stage.word_embedding:
            table = tensor_parallel.VocabParallelEmbedding(
                rows, language.hidden_size, init_method=_not_initialized, config=config, tp_group=context.groups.tp
            )
            self.embedding = nn.ModuleDict({"word_embeddings": table})
        self.layers = build_layers(
            context, context.backend.language_layer(), config=config, numbers=stage.language_layers
        )
        if stage.head:
            self.final_layernorm = context.backend.final_norm()(
                config=context.core.head, hidden_size=language.hidden_size, eps=language.norm_epsilon
            )
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                language.hidden_size,
                rows,
                config=context.core.head,
                init_method=_not_initialized,
                bias=False,
                gather_output=False,
                tp_group=context.groups.tp,
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded tensors. Vocabulary padding may differ between tensor-parallel sizes."""
        result = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        head = result.get(f"{prefix}output_layer.weight")
        if head is not None:
            head.allow_shape_mismatch = True
        return result

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens: int64[t] -> [t, h]."""
        embedded: Tensor = self.embedding["word_embeddings"](tokens)
        return embedded

    def scatter(self, line: Tensor) -> Tensor:
        """Scatter the packed sequence: [t, h] -> [t, 1, h], or [t / tp, 1, h] under sequence parallelism."""
        line = line.unsqueeze(1)
        if self.sequence_parallel:
            line = tensor_parallel.scatter_to_sequence_parallel_region(line)
        return line

    def attention_inputs(self, line: PackedLine) -> AttentionInputs:
        """Return masks and angles of a packed sequence, for all layers of a forward pass.

        Raises:
            ConfigError: in evaluation, if a span is longer than the backend can compute as the published model does.
        """
        device = line.positions.device
        if not self.training and self.long_context.needed(line.longest):
            spans = [self.angles(span, device, read=span) for span in line.lengths]
            scale = self.long_context.query_scale(line.positions)
            return self.backend.long_attention_inputs(line, torch.cat(spans), scale, dtype=self.dtype)
        return self.backend.attention_inputs(line, self.angles(line.longest, device), dtype=self.dtype)

    def angles(self, length: int, device: torch.device, *, read: int | None = None) -> Tensor:
        """Return float32[length, 1, 1, d], the rotary angles; in evaluation, ``read`` tokens are read at once."""
        base = self.rotary_base if read is None else self.long_context.rotary_base(read)
        return rotary_angles(length, head_dim=self.head_dim, base=base, device=device)

    def forward(self, hidden: Tensor, inputs: AttentionInputs, inference: object = None) -> Tensor:
        """Run this stage's layers: [s, b, h] -> [s, b, h], with s / tp for s under sequence parallelism."""
        return run_layers(self.layers, hidden, inputs=inputs, execution=self.execution, inference=inference)

    def logits(self, hidden: Tensor, *, positions: Tensor) -> Tensor:
        """Return logits at chosen positions of the packed sequence.

        Args:
            hidden: [t, 1, h] ([t / tp, 1, h] under sequence parallelism), output of the last layer.
            positions: int64[m].

        Returns:
            [m, padded vocabulary / tp], minus infinity at rows that only pad the vocabulary.
        """
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        chosen = self.final_layernorm(hidden.squeeze(1).index_select(0, positions))
        logits: Tensor = self.output_layer(chosen)[0]
        mine = self.groups.tp.rank() * logits.shape[-1]
        padding = mine + logits.shape[-1] - self.vocab_size
        if padding > 0:
            logits[:, max(self.vocab_size - mine, 0) :] = float("-inf")
        return logits

    def token_losses(self, hidden: Tensor, *, positions: Tensor, targets: Tensor) -> Tensor:
        """Return float32[m]: the cross-entropy of each target at its position.

        Without targets the head runs on one position, and its loss is dropped, since not every kernel accepts zero
        rows. The gradients are zero either way.

        Args:
            hidden: [t, 1, h] ([t / tp, 1, h] under sequence parallelism), output of the last layer.
            positions: int64[m].
            targets: int64[m].
        """
        count = len(positions)
        if count == 0:
            positions = targets = positions.new_zeros(1)
        losses: Tensor = tensor_parallel.vocab_parallel_cross_entropy(
            self.logits(hidden, positions=positions).float(), targets
        )
        return losses[:count]


def _not_initialized(weight: Tensor) -> Tensor:
    """Serve as the initializer that Megatron-Core requires; model/initialize.py initializes all weights afterwards."""
    return weight
