"""Every layout computes what one process computes: the loss and the gradient of every parameter.

fp32, max |difference| <= 1e-5 x max |reference| for each tensor, which makes it zero where the reference is zero.
The micro-batches hold 1, 3, 0 and 2 images in turn, so text-only ones are in every mix, and with four data-parallel
ranks one rank sees nothing else.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from tests.helpers.ranks import RankPools
from tests.helpers.tiny import MODEL, micro_batches, tiny_config
from tests.parallel.gradients import RankGradients, step_on_rank, whole_gradients
from tests.parallel.late import evaluate_with_late_rank, step_with_late_rank

TOLERANCE = 1e-5
BATCHES = 8
STAGE_1 = {"freeze_language_model": True}
STAGE_3 = {"freeze_vision": True}
LEGACY = {"freeze_vision": True, "legacy_finetune_freezing": True}
TEXT_ONLY = {"freeze_vision": True, "freeze_resampler": True}


@dataclass(frozen=True)
class Layout:
    """One way to spread the work; ``name`` is the test's id."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual: int | None = None
    sequence: bool = False
    sharded_optimizer: bool = False
    overlap: bool = False
    cut: str = "auto"
    vision: str = "pipeline"

    @property
    def name(self) -> str:
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}"]
        parts += [f"vp{self.virtual}"] if self.virtual else []
        parts += ["sp"] * self.sequence + ["shard"] * self.sharded_optimizer + ["overlap"] * self.overlap
        parts += ["vision"] * (self.vision == "data")
        return "-".join(parts + ([self.cut] if self.cut != "auto" else []))

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "sequence_parallel": self.sequence,
            "use_distributed_optimizer": self.sharded_optimizer,
            "overlap_grad_reduce": self.overlap,
            "pipeline_layout": self.cut,
            "vision_parallel": self.vision,
            "vision_micro_batch_size": 2,
        }


def _every_layout(world_size: int) -> list[Layout]:
    sizes = [s for s in itertools.product((1, 2, 4), repeat=3) if s[0] * s[1] * s[2] == world_size]
    return [
        Layout(tensor, pipeline, data, virtual, sequence, sharded)
        for tensor, pipeline, data in sizes
        for virtual in ((None, 2) if pipeline > 1 else (None,))
        for sequence in ((False, True) if tensor > 1 else (False,))
        for sharded in (False, True)
    ]


CUTS = [
    Layout(pipeline=2, cut="V*2|V*2RL*4"),
    Layout(pipeline=2, cut="V*4RL*3|L"),
    Layout(pipeline=2, cut="V*4RL*4|"),
    Layout(pipeline=4, cut="V|V*3|R|L*4"),
    Layout(pipeline=4, cut="V*4|RL|L*3|"),
    Layout(pipeline=2, virtual=2, cut="V*2|V*2|R|L*4"),
    Layout(tensor=2, pipeline=2, sequence=True, cut="V*3|VRL*4"),
    Layout(tensor=2, pipeline=2, sequence=True, cut="V*4R|L*4"),
    Layout(data=2, sharded_optimizer=True, overlap=True),
    Layout(pipeline=2, data=2, sharded_optimizer=True, overlap=True),
    Layout(pipeline=2, data=2, virtual=2, sharded_optimizer=True, overlap=True),
]
LAYOUTS = [layout for size in (1, 2, 4) for layout in _every_layout(size)] + CUTS
VISION_DATA = [
    Layout(vision="data"),
    Layout(tensor=2, vision="data"),
    Layout(tensor=2, sequence=True, sharded_optimizer=True, vision="data"),
    Layout(pipeline=2, sharded_optimizer=True, vision="data"),
    Layout(data=2, vision="data"),
    Layout(data=2, sharded_optimizer=True, overlap=True, vision="data"),
    Layout(tensor=4, sequence=True, vision="data"),
    Layout(pipeline=4, vision="data"),
    Layout(pipeline=4, cut="L|L|L*2|", vision="data"),
    Layout(pipeline=2, virtual=2, sharded_optimizer=True, vision="data"),
    Layout(tensor=2, pipeline=2, sequence=True, sharded_optimizer=True, vision="data"),
    Layout(pipeline=2, data=2, sharded_optimizer=True, overlap=True, vision="data"),
    Layout(tensor=2, data=2, vision="data"),
]


def _run(
    ranks: RankPools, layout: Layout, *, span: str = "segment", encoding: dict[str, Any] | None = None, **training: Any
) -> list[RankGradients]:
    parallel = layout.fields | (encoding or {})
    config = tiny_config(parallel=parallel, training=training, data={"attention_span": span})
    results: list[RankGradients] = ranks(layout.world_size).run(step_on_rank, config, _batches(config, span))
    return results


def _batches(config: RunConfig, span: str) -> Any:
    return micro_batches(config.model, BATCHES, span=span)


def _gradients(results: list[RankGradients]) -> dict[str, Tensor]:
    return whole_gradients(results, vocab_size=MODEL.language.vocab_size)


@pytest.fixture(scope="module")
def references(ranks: RankPools) -> dict[Any, list[RankGradients]]:
    """One process, for each set of frozen parts and each attention span."""
    freezes: list[dict[str, Any]] = [{}, STAGE_1, STAGE_3, LEGACY, TEXT_ONLY]
    found = {(tuple(frozen), "segment"): _run(ranks, Layout(), **frozen) for frozen in freezes}
    found[(), "row"] = _run(ranks, Layout(), span="row")
    return found


def _assert_equal(results: list[RankGradients], reference: list[RankGradients]) -> None:
    expected, found = _gradients(reference), _gradients(results)
    assert found.keys() == expected.keys()
    for rank in results:
        assert rank.num_tokens == reference[0].num_tokens
        assert rank.loss == pytest.approx(reference[0].loss, rel=1e-6)
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max().item()
        assert difference <= TOLERANCE * gradient.abs().max().item(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(ranks: RankPools, references: Any, layout: Layout) -> None:
    _assert_equal(_run(ranks, layout), references[(), "segment"])


@pytest.mark.parametrize(
    "encoding",
    [{}, {"vision_recompute_granularity": "layers"}, {"vision_recompute": False}],
    ids=["again", "layers", "kept"],
)
@pytest.mark.parametrize("layout", VISION_DATA, ids=lambda layout: layout.name)
def test_images_encoded_by_all_ranks_equal_one_process(
    ranks: RankPools, references: Any, layout: Layout, encoding: dict[str, Any]
) -> None:
    """Whichever rank encodes an image; ranks get between none and all images of a micro-batch."""
    _assert_equal(_run(ranks, layout, encoding=encoding), references[(), "segment"])


@pytest.mark.parametrize(
    "layout",
    [Layout(pipeline=4, vision="data"), Layout(pipeline=2, virtual=2, vision="data")],
    ids=lambda layout: layout.name,
)
def test_features_that_are_made_when_they_are_due_equal_one_process(
    ranks: RankPools, references: Any, layout: Layout
) -> None:
    """A schedule that is repeated takes all features first; a run takes those of a micro-batch with its turn."""
    ranks.repeats = 1
    _assert_equal(_run(ranks, layout), references[(), "segment"])


@pytest.mark.parametrize("frozen", [STAGE_1, STAGE_3, LEGACY, TEXT_ONLY], ids=["stage1", "stage3", "legacy", "text"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, pipeline=2, sequence=True, sharded_optimizer=True, vision="data"),
        Layout(pipeline=2, virtual=2, vision="data"),
        Layout(tensor=2, data=2, sharded_optimizer=True, vision="data"),
    ],
    ids=lambda layout: layout.name,
)
def test_frozen_parts_equal_one_process_where_all_ranks_encode(
    ranks: RankPools, references: Any, layout: Layout, frozen: dict[str, Any]
) -> None:
    _assert_equal(_run(ranks, layout, **frozen), references[tuple(frozen), "segment"])


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, sequence=True), Layout(pipeline=2), Layout(data=4)], ids=lambda layout: layout.name
)
def test_whole_row_attention_equals_one_process(ranks: RankPools, references: Any, layout: Layout) -> None:
    _assert_equal(_run(ranks, layout, span="row"), references[(), "row"])


@pytest.mark.parametrize(
    ("layout", "frozen", "late"),
    [
        (Layout(pipeline=4), {}, 0),
        (Layout(pipeline=4), STAGE_3, 3),
        (Layout(pipeline=2, virtual=2), {}, 0),
        (Layout(pipeline=4, virtual=2), {}, 0),
        (Layout(pipeline=4, virtual=2), {}, 3),
        (Layout(pipeline=4, virtual=2), STAGE_3, 0),
    ],
    ids=["1f1b-first", "1f1b-frozen-last", "pp2-vp2-first", "pp4-vp2-first", "pp4-vp2-last", "pp4-vp2-frozen-first"],
)
def test_a_late_receiver_gets_what_was_sent(
    ranks: RankPools, references: Any, layout: Layout, frozen: dict[str, Any], late: int
) -> None:
    """The memory of what is sent is freed only when it has been read; the message to rank 0 was once read later."""
    ranks.repeats = 1  # a wrong result would come every time
    config = tiny_config(parallel=layout.fields, training=frozen)
    given, reference = (config, _batches(config, "segment"), late), references[tuple(frozen), "segment"]
    _assert_equal(ranks(layout.world_size).run(step_with_late_rank, *given), reference)
    for loss in ranks(layout.world_size).run(evaluate_with_late_rank, *given):
        assert loss == pytest.approx(reference[0].loss, rel=1e-6)


@pytest.mark.parametrize("frozen", [STAGE_1, STAGE_3, LEGACY, TEXT_ONLY], ids=["stage1", "stage3", "legacy", "text"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2, sharded_optimizer=True),
        Layout(pipeline=4, sharded_optimizer=True),
        Layout(pipeline=4, cut="V|V*3|RL|L*3"),
        Layout(pipeline=2, virtual=2, sharded_optimizer=True),
        Layout(tensor=2, pipeline=2, sequence=True),
        Layout(pipeline=2, data=2, sharded_optimizer=True),
    ],
    ids=lambda layout: layout.name,
)
def test_frozen_parts_equal_one_process(
    ranks: RankPools, references: Any, layout: Layout, frozen: dict[str, Any]
) -> None:
    _assert_equal(_run(ranks, layout, **frozen), references[tuple(frozen), "segment"])


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_changes_nothing(ranks: RankPools, references: Any, granularity: str) -> None:
    for layout in (Layout(), Layout(tensor=2, sequence=True)):
        _assert_equal(_run(ranks, layout, recompute_granularity=granularity), references[(), "segment"])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(tensor=2, pipeline=2),
        Layout(data=2, sharded_optimizer=True),
    ],
    ids=lambda layout: layout.name,
)
def test_bf16_is_as_close_to_fp32_as_one_bf16_process(ranks: RankPools, references: Any, layout: Layout) -> None:
    exact = _gradients(references[(), "segment"])
    single = _distance(_gradients(_run(ranks, Layout(), bf16=True)), exact)
    spread = _distance(_gradients(_run(ranks, layout, bf16=True)), exact)
    assert 0.0 < spread <= 1.5 * single


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Norm of all differences, relative to the norm of all gradients."""
    difference = torch.stack([(found[name] - gradient).norm() for name, gradient in exact.items()]).norm()
    return float(difference / torch.stack([gradient.norm() for gradient in exact.values()]).norm())
