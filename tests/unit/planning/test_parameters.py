from __future__ import annotations

import pytest

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.layout import PipelineLayout, parse_layout
from megatron_vl.planning.parameters import count_parameters, model_tensors, parameters_by_rank, stage_tensors, trains
from megatron_vl.planning.vocabulary import padded_vocab_size

QWEN_VL = PRESETS["qwen_vl_7b"]
TINY = PRESETS["tiny"]


def test_the_published_model() -> None:
    counts = count_parameters(QWEN_VL)
    assert sum(counts.values()) == 9_655_886_592
    vision = sum(count for name, count in counts.items() if name.startswith("vision"))
    assert (vision, counts["resampler"]) == (1_842_770_688, 76_054_528 + 16_785_408 - 1_048_576)
    assert sum(count for name, count in counts.items() if name.startswith("language_model")) == 7_721_324_544
    buffers = [spec for spec in model_tensors(QWEN_VL) if spec.is_buffer]
    assert [(spec.name, spec.size) for spec in buffers] == [("resampler.pos_embed", 1_048_576)]


def test_names_are_unique_and_belong_to_three_parts() -> None:
    specs = model_tensors(TINY)
    assert len({spec.name for spec in specs}) == len(specs) == 4 + 3 * 12 + 14 + 1 + 3 * 7 + 2
    assert {spec.part for spec in specs} == {"vision", "resampler", "language_model"}


@pytest.mark.parametrize("text", ["V*3RL*3", "V|V*2|RL|L*2", "V*3|R|L*3|", "V*2|VRL|L|L"])
def test_stages_hold_every_tensor_once(text: str) -> None:
    layout = parse_layout(text, model=TINY, pipeline_size=text.count("|") + 1)
    staged = [spec for stage in layout.stages for spec in stage_tensors(TINY, stage)]
    assert staged == model_tensors(TINY)


@pytest.mark.parametrize(
    ("training", "trained_parts"),
    [
        (TrainingConfig(), {"vision", "resampler", "language_model"}),
        (TrainingConfig(freeze_language_model=True), {"vision", "resampler"}),
        (TrainingConfig(freeze_vision=True), {"resampler", "language_model"}),
    ],
)
def test_trained_and_frozen_over_pipeline_ranks(training: TrainingConfig, trained_parts: set[str]) -> None:
    config = RunConfig(model=QWEN_VL, training=training)
    layout = parse_layout("V*24|V*24R|L*16|L*16", model=QWEN_VL, pipeline_size=4)
    ranks = parameters_by_rank(config, layout)
    expected = sum(s.size for s in model_tensors(QWEN_VL) if s.part in trained_parts and not s.is_buffer)
    assert sum(rank.trained for rank in ranks) == expected
    assert sum(rank.trained + rank.frozen for rank in ranks) == 9_655_886_592
    assert [rank.pipeline_rank for rank in ranks] == [0, 1, 2, 3]


def test_the_released_script_trains_the_position_table_and_not_what_follows_the_resampler() -> None:
    paper = FrozenParts.of(TrainingConfig(freeze_vision=True))
    legacy = FrozenParts.of(TrainingConfig(freeze_vision=True, legacy_finetune_freezing=True))
    changed = {spec.name: trains(spec.name, legacy) for spec in model_tensors(QWEN_VL)
               if trains(spec.name, legacy) != trains(spec.name, paper)}  # fmt: skip
    assert changed == {
        "resampler.pos_embed": True,
        "resampler.ln_post.weight": False,
        "resampler.ln_post.bias": False,
        "resampler.proj": False,
    }
    config = RunConfig(model=QWEN_VL, training=TrainingConfig(freeze_vision=True, legacy_finetune_freezing=True))
    (rank,) = parameters_by_rank(config, PipelineLayout.whole(QWEN_VL))
    assert rank.trained == 7_721_324_544 + 76_054_528, "the language model, and the resampler with its table"
    assert rank.frozen == 1_842_770_688 + 16_785_408, "the vision tower, ln_post and proj"


def test_virtual_stages_count_for_their_rank() -> None:
    layout = parse_layout("V*2|VR|L*2|L", model=TINY, pipeline_size=2, virtual_size=2)
    ranks = parameters_by_rank(RunConfig(model=TINY), layout)
    assert sum(rank.trained for rank in ranks) == sum(count_parameters(TINY).values())
    assert ranks[0].units == "patch embedding, V 0-1; word embedding, L 0-1"


def test_tensor_parallelism_splits_what_is_split() -> None:
    config = RunConfig(model=QWEN_VL, parallel=ParallelConfig(tensor_model_parallel_size=4))
    rank, *others = parameters_by_rank(config, PipelineLayout.whole(QWEN_VL))
    assert [other.tensor_rank for other in others] == [1, 2, 3]
    assert all(other.trained == rank.trained for other in others)
    vision, hidden, ffn = 1664, 4096, 11008
    vision_layer = (3 * vision**2 + 3 * vision + vision**2 + 2 * 8192 * vision + 8192) // 4 + 6 * vision
    language_layer = (4 * hidden**2 + 3 * hidden + 3 * hidden * ffn) // 4 + 2 * hidden
    vocabulary = 2 * 152_064 // 4 * hidden  # padded from 151,936 to a multiple of 512
    whole = 978_432 + 425_984 + 3_328 + 91_791_360 + hidden  # stem, resampler, final norm
    assert rank.trained == 48 * vision_layer + 32 * language_layer + vocabulary + whole


def test_a_width_that_does_not_divide() -> None:
    config = RunConfig(model=TINY, parallel=ParallelConfig(tensor_model_parallel_size=3))
    with pytest.raises(ConfigError, match="num_attention_heads 4 cannot be split over"):
        parameters_by_rank(config, PipelineLayout.whole(TINY))


@pytest.mark.parametrize(
    ("vocab_size", "tensor_size", "padded"),
    [(151_936, 1, 151_936), (151_936, 2, 152_064), (151_936, 8, 152_576), (640, 2, 768), (1, 1, 128)],
)
def test_vocabulary_padding(vocab_size: int, tensor_size: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor_size) == padded
