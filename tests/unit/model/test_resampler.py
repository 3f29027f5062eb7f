"""The adapter against ``torch.nn.MultiheadAttention``, and its table of positions against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vl.conversion.convert import import_folder
from megatron_vl.model.resampler import sincos_positions
from tests.helpers.tiny import ODD_MODEL
from tests.parallel.golden import FOLDER
from tests.unit.model.parts import Inputs, Outputs


class Reference(nn.Module):
    """The resampler as the original composes it, under our names."""

    def __init__(self) -> None:
        super().__init__()
        width, queries = ODD_MODEL.language.hidden_size, ODD_MODEL.resampler.num_queries
        epsilon = ODD_MODEL.vision.layernorm_epsilon
        self.query = nn.Parameter(torch.empty(queries, width))
        self.register_buffer("pos_embed", torch.empty(queries, width))
        self.kv_proj = nn.Linear(ODD_MODEL.vision.hidden_size, width, bias=False)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=epsilon) for _ in range(3))
        self.attn = nn.MultiheadAttention(width, ODD_MODEL.resampler.num_attention_heads)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        """[patches, n, vision width] -> [queries, n, h]."""
        side, grid = math.isqrt(len(self.pos_embed)), ODD_MODEL.patch_grid
        image = self.pos_embed.T.reshape(1, -1, side, side)
        resized = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T
        values = self.ln_kv(self.kv_proj(patches))
        queries = (self.ln_q(self.query) + self.pos_embed)[:, None].repeat(1, patches.shape[1], 1)
        attended, _ = self.attn(queries, values + resized[:, None], values)
        result: Tensor = self.ln_post(attended) @ self.proj
        return result


@pytest.fixture(scope="module")
def reference(outputs: Outputs) -> Reference:
    module = Reference()
    prefix = "resampler."
    own = {name.removeprefix(prefix): value for name, value in outputs.weights.items() if name.startswith(prefix)}
    module.load_state_dict(own)
    return module


def test_resampler_equals_torch_s_attention(reference: Reference, inputs: Inputs, outputs: Outputs) -> None:
    expected = reference(inputs.patches)
    assert (outputs.resampler - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert gradients.keys() == outputs.resampler_gradients.keys()
    for name, gradient in gradients.items():
        difference = (outputs.resampler_gradients[name] - gradient).abs().max()
        # The keys' bias moves every score of a query alike, so its gradient is zero but for rounding.
        assert difference <= 2e-5 * max(gradient.abs().max(), gradients["attn.in_proj_weight"].abs().max()), name


def test_positions_are_sines_of_the_column_then_of_the_row() -> None:
    side, width = 4, 24
    table = sincos_positions(side, width)
    assert table.shape == (side**2, width) and table.dtype == torch.float32
    for y, x in [(0, 0), (0, 3), (2, 1), (3, 3)]:
        expected = []
        for place in (x, y):
            angles = [place * 10000.0 ** (-j / (width / 4)) for j in range(width // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert table[y * side + x].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_are_those_of_the_published_checkpoint() -> None:
    """Stored there in bfloat16; the published model has the same table at width 4096."""
    stored = import_folder(FOLDER)["resampler.pos_embed"]
    assert torch.equal(sincos_positions(16, 256).to(stored.dtype), stored)
    table = sincos_positions(16, 4096)
    assert table[:, 1].tolist() == pytest.approx([math.sin(x * 10000 ** (-1 / 1024)) for x in range(16)] * 16, abs=1e-6)
    assert torch.equal(table[:16, 2048:], table[:1, 2048:].expand(16, -1)), "within a row of the grid only x changes"
