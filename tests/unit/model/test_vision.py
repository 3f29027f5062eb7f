from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_vl.model.vision import PatchEmbedding, interpolate_positions


def test_positions_of_the_same_grid_are_the_table_itself() -> None:
    table = torch.randn(9, 5)
    assert interpolate_positions(table, grid=3) is table


@pytest.mark.parametrize("grid", [2, 5, 8])
def test_positions_are_resized_as_an_image(grid: int) -> None:
    """Row-major in and out, bicubic, no antialiasing: what becomes of one cell stays around its place."""
    table = torch.zeros(16, 1)
    table[1 * 4 + 3] = 1.0  # row 1, column 3
    resized = interpolate_positions(table, grid=grid).view(grid, grid)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 3] = 1.0
    expected = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=False)[0, 0]
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(resized, resized.T)
    if grid == 8:
        row, column = divmod(int(resized.argmax()), grid)
        assert row // 2 == 1 and column // 2 == 3


def test_bfloat16_positions_are_resized_in_fp32() -> None:
    table = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = interpolate_positions(table, grid=7)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, interpolate_positions(table.float(), grid=7).bfloat16())


def test_gradients_reach_every_row_of_the_table() -> None:
    table = torch.randn(16, 2, requires_grad=True)
    interpolate_positions(table, grid=5).square().sum().backward()
    assert (table.grad.abs().sum(dim=1) > 0).all()


def test_patch_embedding_is_a_convolution() -> None:
    module = PatchEmbedding(6, 3, torch.float32)
    generator = torch.Generator().manual_seed(0)
    module.weight.data = torch.randn(6, 3, 3, 3, generator=generator)
    pixels = torch.randn(2, 3, 12, 6, generator=generator)
    expected = F.conv2d(pixels, module.weight, stride=3).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(module(pixels), expected, rtol=0, atol=1e-5)
    assert expected.shape == (8, 2, 6)
