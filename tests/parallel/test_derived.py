"""Models of other sizes, from a published folder on disk through import, every layout and export.

The weights are random, and the folder is written without the project. What every layout computes equals one process and
the formulas of ``tests/helpers/reference.py`` on the folder's own tensors; what is exported equals the folder's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vl.checkpoint.tensors import open_checkpoint
from megatron_vl.conversion.convert import ExportOptions, export_folder
from megatron_vl.evaluation.forward_inputs import ForwardInputs
from tests.helpers.published import IMAGE_START, Kind, published_config, random_tensors, write_folder
from tests.helpers.ranks import RankPools
from tests.helpers.reference import reference_features, reference_forward, reference_loss
from tests.parallel.golden import Layout, Outputs, forward_on_rank, import_on_rank
from tests.unit.conversion.samples import assert_same_bytes, read_with_libraries


@dataclass(frozen=True)
class Model:
    """A model of the published layout, and how its folder is written."""

    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    kind: Kind = "safetensors"
    shards: int = 1
    tail: int = 9
    """Tokens of text behind the images of the first row."""


MODELS = {
    # The image's grid is the position table's.
    "no-interpolation": Model(
        published_config(
            vision=(3, 48, 2), language=(3, 64, 4), visual={"image_size": 224, "n_queries": 16, "resampler_heads": 4}
        )
    ),
    # Nothing is a power of two, and w1 lies in another shard than w2.
    "apart": Model(
        published_config(
            vision=(2, 72, 4),
            language=(5, 96, 6),
            visual={"image_size": 280, "n_queries": 9, "resampler_heads": 3, "mlp_ratio": 2.75},
            vocab_size=477,
            intermediate_size=152,
        ),
        kind="bin",
        shards=3,
    ),
    # The grid is smaller than the table, which is not 16 x 16; other patches, epsilon and base; fp32.
    "shrunk": Model(
        published_config(
            vision=(5, 32, 8),
            language=(2, 128, 2),
            visual={"image_size": 40, "patch_size": 8, "position_grid": 7, "n_queries": 4},
            layer_norm_epsilon=1e-5,
            rotary_emb_base=500,
        ),
        dtype=torch.float32,
        shards=2,
    ),
    # Rows beyond the native length: dynamic NTK and logn in evaluation, neither in training.
    "long": Model(
        published_config(
            vision=(2, 32, 2),
            language=(3, 64, 4),
            visual={"image_size": 28, "position_grid": 2, "n_queries": 4, "resampler_heads": 2},
            seq_length=24,
        ),
        dtype=torch.float16,
        kind="bin",
        tail=50,
    ),
    # The published number of queries and heads' width, at the usual resolution.
    "published-queries": Model(
        published_config(vision=(2, 64, 4), language=(2, 256, 4), visual={"image_size": 448}), kind="bin", shards=2
    ),
}
LAYOUTS = {
    "one": Layout({}),
    "tp2": Layout({"tensor_model_parallel_size": 2}),
    "pp2": Layout({"pipeline_model_parallel_size": 2}),
    "tp2-pp2": Layout({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "dp2": Layout({}, data=2),
}


@dataclass(frozen=True)
class Imported:
    """A model on disk and what the formulas make of it."""

    tensors: dict[str, Tensor]
    checkpoint: Path
    inputs: ForwardInputs
    expected: dict[str, Tensor]
    """As ``tools/forward.py`` would write it."""
    computed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By layout, what it does write."""


def make_inputs(model: Model, seed: int) -> ForwardInputs:
    """Three rows: two images and text; text and padding; text around an image whose slots hold a path."""
    visual, generator = model.config["visual"], torch.Generator().manual_seed(seed)
    queries, size = visual.get("n_queries", 256), visual["image_size"]
    pad = IMAGE_START + 2

    def text(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    def image(path: bytes = b"") -> list[int]:
        return [IMAGE_START, *path, *[pad] * (queries - len(path)), IMAGE_START + 1]

    rows = [image() + text(2) + image() + text(model.tail), text(7), text(3) + image(b"a/b") + text(8)]
    length = len(rows[0])
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, tokens in enumerate(rows):
        supervised = torch.arange(len(tokens) - 5, len(tokens))
        labels[row, supervised] = ids[row, supervised]
    labels[0, 0] = 5  # nothing comes before it: no target
    return ForwardInputs("inputs", ids, torch.randn(3, 3, size, size, generator=generator), labels)


def expected_outputs(model: Model, tensors: dict[str, Tensor], inputs: ForwardInputs) -> dict[str, Tensor]:
    """Logits, features, loss and gradient norms by the formulas, in fp32 and one process."""
    weights = {name: tensor.float().requires_grad_("pos_embed" not in name) for name, tensor in tensors.items()}
    assert inputs.pixels is not None and inputs.labels is not None
    ids, pixels = inputs.input_ids, inputs.pixels
    loss = reference_loss(reference_forward(weights, model.config, ids, pixels, training=True), inputs.labels)
    loss.backward()
    norms = {name: weight.grad.norm() for name, weight in weights.items() if weight.grad is not None}
    with torch.no_grad():
        return {
            "logits": reference_forward(weights, model.config, ids, pixels, training=False),
            "visual_output": reference_features(weights, model.config, pixels),
            "loss": loss[None],
            "grad_norm_total": torch.stack(list(norms.values())).norm()[None],
            **{f"grad_norm.{name}": norm[None] for name, norm in norms.items()},
        }


@pytest.fixture(scope="module")
def imported(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Imported]:
    """``imported(name)``: the model as a checkpoint."""
    done: dict[str, Imported] = {}

    def make(name: str) -> Imported:
        if name not in done:
            model, seed = MODELS[name], list(MODELS).index(name)
            folder = tmp_path_factory.mktemp(name)
            tensors, inputs = random_tensors(model.config, model.dtype, seed), make_inputs(model, seed)
            write_folder(folder / "hf", model.config, tensors, kind=model.kind, shards=model.shards)
            checkpoint = ranks(1).run(import_on_rank, folder / "checkpoint", folder / "hf")[0]
            done[name] = Imported(tensors, checkpoint, inputs, expected_outputs(model, tensors, inputs))
        return done[name]

    return make


def _compute(ranks: RankPools, model: Imported, layout: str) -> dict[str, Tensor]:
    if layout not in model.computed:
        where = LAYOUTS[layout]
        outputs: list[Outputs] = ranks(where.world_size).run(forward_on_rank, where, model.inputs, model.checkpoint)
        assert all(not other.tensors for other in outputs[1:])
        model.computed[layout] = outputs[0].tensors
    return model.computed[layout]


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor within what the golden files are held to, relative to its largest value."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = {"logits": 2e-5, "visual_output": 1e-5, "loss": 5e-6}.get(name, 1e-4)
        assert found[name].shape == tensor.shape, name
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_computes_the_formulas(
    ranks: RankPools, imported: Callable[[str], Imported], name: str, layout: str
) -> None:
    model = imported(name)
    found = _compute(ranks, model, layout)
    _assert_equal(found, model.expected)
    _assert_equal(found, _compute(ranks, model, "one"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_out_is_what_went_in(
    imported: Callable[[str], Imported], tmp_path: Path, name: str, kind: Kind
) -> None:
    model = imported(name)
    state = open_checkpoint(model.checkpoint)
    export_folder(state, state.model, tmp_path / "out", options=ExportOptions(file_format=kind))
    assert_same_bytes(read_with_libraries(tmp_path / "out"), model.tensors)


def test_the_models_are_what_they_are_for(imported: Callable[[str], Imported]) -> None:
    long, apart = imported("long"), imported("apart")
    stretched = long.expected["logits"]
    plain = reference_forward(
        {name: tensor.float() for name, tensor in long.tensors.items()},
        MODELS["long"].config,
        long.inputs.input_ids,
        long.inputs.pixels,
        training=True,
    )
    assert (stretched - plain).abs().max() > 1e-2 * plain.abs().max(), "the two modes differ beyond the native length"
    names = list(apart.tensors)
    shards = {name: names.index(name) % MODELS["apart"].shards for name in names}
    assert shards["transformer.h.0.mlp.w1.weight"] != shards["transformer.h.0.mlp.w2.weight"]
