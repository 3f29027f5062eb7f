"""The vision tower: OpenCLIP's ViT-bigG as Qwen-VL changed it (``visual.py`` of the published model).

* There is no class token: the position table has a row for each cell of a 16 x 16 grid and nothing else.
* The table is interpolated (bicubic, no antialiasing, in fp32) to the grid of the image on every forward pass, in
  training too, so gradients reach all its rows. Interpolation is linear, so it is a product with a fixed matrix along
  each axis. torch's own interpolation has no deterministic backward pass on GPUs.
* ``ln_pre`` comes before the blocks. No norm follows them (``ln_post`` follows the resampler).
* q, k and v are interleaved by head, which is also Megatron-Core's layout. GELU is exact. LayerNorm's epsilon is 1e-6.
* A parameter is read only in the forward pass of the module that owns it. Where parameters are gathered during the
  pass, the call of a module waits for the module's own parameters only.
* Images are normalized here, on the device: they travel as uint8.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs
from megatron_vl.data.images.pixels import normalize
from megatron_vl.model.context import BuildContext, build_layers, run_layers
from megatron_vl.model.sharding import ShardedModule
from megatron_vl.planning.layout import StageLayout


def interpolate_positions(table: Tensor, *, grid: int) -> Tensor:
    """Resize a table of grid x grid positions to another grid.

    Args:
        table: [source**2, h], row-major.
        grid: side of the target grid.

    Returns:
        [grid**2, h] in the dtype of the table.
    """
    source = round(table.shape[0] ** 0.5)
    if source == grid:
        return table
    matrix = _bicubic(source, grid, table.device)
    resized = matrix @ (matrix @ table.float().view(source, -1)).view(grid, source, -1)
    return resized.view(grid * grid, -1).to(table.dtype)


@functools.cache
def _bicubic(source: int, grid: int, device: torch.device) -> Tensor:
    """Return float32[grid, source]: the weight of each source cell in each target cell, along one axis."""
    lines = torch.eye(source, dtype=torch.float64)[:, None, None, :]
    resized = F.interpolate(lines, size=(1, grid), mode="bicubic", align_corners=False)
    return resized.view(source, grid).T.to(device, torch.float32)


class PatchEmbedding(nn.Module):
    """The convolution over patches, as one matrix product. Its weight has the convolution's shape [h, 3, p, p]."""

    def __init__(self, hidden_size: int, patch_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(hidden_size, 3, patch_size, patch_size, dtype=dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed patches: float[n, 3, H, W] -> [patches, n, h], patches in row-major order."""
        number, channels, height, width = pixels.shape
        side = self.patch_size
        patches = pixels.view(number, channels, height // side, side, width // side, side)
        patches = patches.permute(2, 4, 0, 1, 3, 5).reshape(-1, number, channels * side * side)
        return F.linear(patches, self.weight.flatten(1))


class VisionTower(ShardedModule):
    """The vision layers of one stage, with the patch embedding where the stage has it."""

    def __init__(self, context: BuildContext, stage: StageLayout) -> None:
        super().__init__(context.groups)
        vision, config = context.model.vision, context.core.vision
        self.grid = context.model.patch_grid
        self.sequence_parallel = context.sequence_parallel
        self.execution = context.execution(config)
        self.has_patch_embed = stage.patch_embed
        if stage.patch_embed:
            dtype = config.params_dtype
            self.patch_embed = PatchEmbedding(vision.hidden_size, vision.patch_size, dtype)
            self.positional_embedding = nn.Parameter(
                torch.empty(vision.position_grid**2, vision.hidden_size, dtype=dtype)
            )
            self.ln_pre = nn.LayerNorm(vision.hidden_size, eps=vision.layernorm_epsilon, dtype=dtype)
        self.layers = build_layers(context, context.backend.vision_layer(), config=config, numbers=stage.vision_layers)

    def forward(self, images: Tensor) -> Tensor:
        """Run this stage's part of the tower; return [patches, n, h] (patches / tp under sequence parallelism).

        Args:
            images: pixels, uint8 or normalized float [n, 3, H, W], where the stage has the patch embedding; elsewhere
                patches [patches, n, h] (patches / tp under sequence parallelism).
        """
        hidden = self._embed(images) if self.has_patch_embed else images
        return run_layers(self.layers, hidden, inputs=AttentionInputs(), execution=self.execution)

    def _embed(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels)
        hidden = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        hidden = hidden + interpolate_positions(self.positional_embedding, grid=self.grid).unsqueeze(1)
        hidden = self.ln_pre(hidden)
        if self.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden
