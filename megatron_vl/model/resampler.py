"""The position-aware adapter: one cross-attention from learned queries to the patches (``visual.py``, Resampler).

* Sin-cos positions are added to queries and keys, never to values. So keys and values are projected from different
  inputs. Megatron-Core's cross-attention has one input for both and cannot be used.
* The position table is stored in the checkpoint and interpolated (not recomputed) to the patch grid. Its first half
  encodes the column, its second half the row. It is a buffer. Under ``training.legacy_finetune_freezing`` it trains and
  is a parameter of the same name.
* There is no residual and no MLP. ``ln_post`` and ``proj`` follow it; the paper counts them as part of the adapter.
* It is replicated over tensor-parallel ranks: 0.9 % of the model's weights and 3 % of the vision tower's work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_vl.model.context import BuildContext
from megatron_vl.model.sharding import ShardedModule
from megatron_vl.model.vision import interpolate_positions


def sincos_positions(side: int, width: int) -> Tensor:
    """Return the 2-D sin-cos table.

    Returns:
        float32[side**2, width]: for the cell in row y and column x, row-major, [sin(x w), cos(x w), sin(y w), cos(y w)]
        with ``w_j = 10000 ** (-j / (width / 4))``.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


class CrossAttention(nn.Module):
    """Multi-head attention with one projection [Wq; Wk; Wv], the layout of ``torch.nn.MultiheadAttention``."""

    def __init__(self, width: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width, dtype=dtype))
        self.out_proj = nn.Linear(width, width, dtype=dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from the queries to the patches of each image.

        Args:
            query: [q, h], the same for every image.
            key: [patches, n, h].
            value: [patches, n, h].

        Returns:
            [q, n, h].
        """
        number = key.shape[1]
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        queries = self._heads(projected[0].unsqueeze(1)).expand(number, -1, -1, -1)
        context = F.scaled_dot_product_attention(queries, self._heads(projected[1]), self._heads(projected[2]))
        return self.out_proj(context.permute(2, 0, 1, 3).flatten(2))

    def _heads(self, line: Tensor) -> Tensor:
        """Split heads: [s, n, h] -> [n, heads, s, d]."""
        length, number, _ = line.shape
        return line.view(length, number, self.num_heads, -1).permute(1, 2, 0, 3)


class Resampler(ShardedModule):
    """Reduce the patches of an image to the features that fill its slots."""

    pos_embed: Tensor

    def __init__(self, context: BuildContext) -> None:
        super().__init__(context.groups)
        model = context.model
        width, queries = model.language.hidden_size, model.resampler.num_queries
        dtype, epsilon = context.core.vision.params_dtype, model.vision.layernorm_epsilon
        self.grid = model.patch_grid
        self.sequence_parallel = context.sequence_parallel
        self.query = nn.Parameter(torch.empty(queries, width, dtype=dtype))
        table = sincos_positions(round(queries**0.5), width).to(dtype)
        if context.trains_position_table:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.kv_proj = nn.Linear(model.vision.hidden_size, width, bias=False, dtype=dtype)
        self.ln_q = nn.LayerNorm(width, eps=epsilon, dtype=dtype)
        self.ln_kv = nn.LayerNorm(width, eps=epsilon, dtype=dtype)
        self.attn = CrossAttention(width, model.resampler.num_attention_heads, dtype)
        self.ln_post = nn.LayerNorm(width, eps=epsilon, dtype=dtype)
        self.proj = nn.Parameter(torch.empty(width, width, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Reduce [patches, n, vision width] (patches / tp under sequence parallelism) to [queries, n, h]."""
        if self.sequence_parallel:
            # All that follows is the same on every tensor-parallel rank, and so is the gradient that returns.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        keys = self.ln_kv(self.kv_proj(hidden))
        positions = interpolate_positions(self.pos_embed, grid=self.grid).unsqueeze(1)
        features = self.attn(self.ln_q(self.query) + self.pos_embed, keys + positions, keys)
        return self.ln_post(features) @ self.proj
