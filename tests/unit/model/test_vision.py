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


@pytest.mark.parametrize(("source", "grid"), [(16, 32), (16, 8), (9, 14), (3, 4)])
def test_the_fixed_matrix_is_torch_s_interpolation(source: int, grid: int) -> None:
    """Values and gradients to the rounding of fp32, at the published sizes and at odd ones."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(source**2, 24, generator=generator, requires_grad=True)
    weights = torch.randn(grid**2, 24, generator=generator)
    found = interpolate_positions(table, grid=grid)
    image = table.double().view(1, source, source, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T
    gradients = [torch.autograd.grad((values * weights).sum(), table)[0] for values in (found, expected)]
    for ours, theirs in ((found.detach(), expected.detach()), gradients):
        assert (ours - theirs).abs().max() <= 2e-7 * theirs.abs().max()


def test_no_operation_without_a_deterministic_backward_is_used() -> None:
    """On GPUs torch refuses the backward pass of its own interpolation under deterministic algorithms."""
    table = torch.randn(16, 2, requires_grad=True)
    todo, names = [interpolate_positions(table, grid=5).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    assert not any("Upsample" in name for name in names) and "MmBackward0" in names


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
