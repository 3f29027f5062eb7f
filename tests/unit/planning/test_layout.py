from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.errors import ConfigError
from megatron_vl.planning.flops import FrozenParts, Work, unit_flops
from megatron_vl.planning.layout import (
    PipelineLayout,
    assumed_work,
    balanced_layout,
    parse_layout,
    resolve_layout,
    vision_part,
)

QWEN_VL = PRESETS["qwen_vl_7b"]
TINY = PRESETS["tiny"]


def sized(num_vision: int, num_language: int) -> ModelConfig:
    return replace(
        TINY,
        vision=replace(TINY.vision, num_layers=num_vision),
        language=replace(TINY.language, num_layers=num_language),
    )


def test_written_layout_says_what_each_stage_holds() -> None:
    layout = parse_layout("V*24|V*24R|L*16|L*16", model=QWEN_VL, pipeline_size=4)
    first, second, third, last = layout.stages
    assert (first.vision_layers, first.patch_embed, first.resampler) == (range(24), True, False)
    assert (second.vision_layers, second.patch_embed, second.resampler) == (range(24, 48), False, True)
    assert (third.language_layers, third.word_embedding, third.head) == (range(16), True, False)
    assert (last.language_layers, last.word_embedding, last.head) == (range(16, 32), False, True)
    assert str(layout) == "V*24|V*24R|L*16|L*16"
    assert [str(stage) for stage in layout.stages] == [
        "patch embedding, V 0-23",
        "V 24-47, resampler",
        "word embedding, L 0-15",
        "L 16-31, head",
    ]


def test_stages_of_one_unit_and_of_the_head_alone() -> None:
    layout = parse_layout(" V V | V | R | L*2 | L | ", model=TINY, pipeline_size=3, virtual_size=2)
    assert str(layout) == "V*2|V|R|L*2|L|"
    assert [stage.resampler for stage in layout.stages] == [False, False, True, False, False, False]
    assert [stage.word_embedding for stage in layout.stages] == [False, False, False, True, False, False]
    assert str(layout.stages[-1]) == "head" and layout.stages[-1].head
    assert not any(stage.head for stage in layout.stages[:-1])


def test_resampler_and_language_layers_may_share_a_stage() -> None:
    stages = parse_layout("V*3|RL*3", model=TINY, pipeline_size=2).stages
    assert (stages[1].resampler, stages[1].word_embedding, stages[1].patch_embed) == (True, True, False)


def test_virtual_stages_alternate_between_pipeline_ranks() -> None:
    layout = parse_layout("V*2|VR|L*2|L", model=TINY, pipeline_size=2, virtual_size=2)
    assert [layout.stage_index(rank, chunk) for chunk in (0, 1) for rank in (0, 1)] == [0, 1, 2, 3]
    assert layout.stages_of_rank(1) == (layout.stages[1], layout.stages[3])


def test_whole_model_in_one_stage() -> None:
    assert PipelineLayout.whole(TINY) == parse_layout("V*3RL*3", model=TINY, pipeline_size=1)


@pytest.mark.parametrize(
    ("text", "pipeline_size", "message"),
    [
        ("V*24|V*23R|L*16|L*16", 4, r"47 V \(24 \+ 23\) where the model has 48 vision layers"),
        ("V*48R|L*30", 2, "30 L where the model has 32 language layers"),
        ("V*47R|L*30", 2, "47 V where the model has 48 vision layers and 30 L where"),
        ("L*17|L*15", 2, "0 V where .* or use 'auto'; .* whole, add --vision-parallel data"),
        ("V*48|L*32", 2, "0 R where the model has 1 resampler"),
        ("V*48R|RL*32", 2, "out of order|2 R"),
        ("V*24|V*24R|L*32", 4, "has 3 stages, but pipeline_model_parallel_size 4 x .* 1 = 4 stages"),
        ("V*24||V*24R|L*32", 4, "stage 1 of .* is empty"),
        ("|V*48RL*32", 2, "stage 0 of .* is empty"),
        ("L*32|V*48R", 2, "out of order"),
        ("V*48R|L*32 H", 2, "cannot read 'H'"),
        ("V*48R|L*x", 2, r"cannot read '\*x'"),
        ("V*999999R|L*32", 2, "cannot read"),
        ("", 1, "0 V where"),
    ],
)
def test_impossible_layouts_spell_out_the_arithmetic(text: str, pipeline_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_layout(text, model=QWEN_VL, pipeline_size=pipeline_size)
    assert str(caught.value).startswith("parallel.pipeline_layout: ")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_any_cut_keeps_every_unit_once_and_is_read_as_written(
    data: st.DataObject, num_vision: int, num_language: int, pipeline_size: int, virtual_size: int
) -> None:
    model, num_stages = sized(num_vision, num_language), pipeline_size * virtual_size
    line = "V" * num_vision + "R" + "L" * num_language
    assume(num_stages - 1 <= len(line))
    cuts = data.draw(st.sets(st.integers(1, len(line)), min_size=num_stages - 1, max_size=num_stages - 1))
    text = "|".join(line[a:b] for a, b in pairwise([0, *sorted(cuts), len(line)]))
    layout = parse_layout(text, model=model, pipeline_size=pipeline_size, virtual_size=virtual_size)
    stages = layout.stages
    assert [i for stage in stages for i in stage.vision_layers] == list(range(num_vision))
    assert [i for stage in stages for i in stage.language_layers] == list(range(num_language))
    for flag in ("patch_embed", "resampler", "word_embedding", "head"):
        assert sum(getattr(stage, flag) for stage in stages) == 1
    again = parse_layout(str(layout), model=model, pipeline_size=pipeline_size, virtual_size=virtual_size)
    assert again == layout


@pytest.mark.parametrize("frozen", [{}, {"freeze_vision": True}, {"freeze_language_model": True}])
@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_computed_layout_wastes_little(frozen: dict[str, bool], num_stages: int) -> None:
    training, parallel = TrainingConfig(**frozen), ParallelConfig(pipeline_model_parallel_size=num_stages)
    work = Work(num_images=4, num_tokens=2048, sum_squared_spans=4 * 512**2, num_supervised=2048)
    layout = balanced_layout(RunConfig(model=QWEN_VL, training=training, parallel=parallel), work)
    costs = unit_flops(QWEN_VL, FrozenParts.of(training), work)
    lengths = [len(s.vision_layers) + s.resampler + len(s.language_layers) + s.head for s in layout.stages]
    loads = [sum(costs[sum(lengths[:i]) : sum(lengths[: i + 1])]) for i in range(num_stages)]
    assert sum(lengths) == len(costs)
    # The whole tower on stage 0 would reach 0.29 to 0.76. A layer and the head are large pieces for 8 stages.
    assert sum(loads) / num_stages / max(loads) > 0.87


def test_frozen_parts_move_the_cut() -> None:
    config = RunConfig(model=QWEN_VL, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    everything = resolve_layout(config)
    stage_3 = resolve_layout(replace(config, training=TrainingConfig(freeze_vision=True)))
    stage_1 = resolve_layout(replace(config, training=TrainingConfig(freeze_language_model=True)))
    assert len({str(everything), str(stage_3), str(stage_1)}) == 3
    assert stage_1.stages[0].language_layers == range(0) or len(stage_1.stages[0].language_layers) < len(
        stage_3.stages[0].language_layers
    )


def test_resolve_takes_what_is_written() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_layout="V|V*2R|L|L*2"
    )
    layout = resolve_layout(RunConfig(model=TINY, parallel=parallel))
    assert (str(layout), layout.pipeline_size, layout.virtual_size) == ("V|V*2R|L|L*2", 2, 2)


def test_a_whole_vision_part_leaves_the_language_layers_to_cut() -> None:
    layout = parse_layout("L*2|L", model=TINY, pipeline_size=2, vision_parallel="data")
    first, last = layout.stages
    assert (first.language_layers, last.language_layers) == (range(2), range(2, 3))
    assert (first.word_embedding, first.patch_embed, first.resampler, last.head) == (True, False, False, True)
    part = vision_part(TINY)
    assert (part.units, part.patch_embed, part.word_embedding, part.head) == ("V*3R", True, False, False)
    parallel = ParallelConfig(pipeline_model_parallel_size=4, vision_parallel="data")
    assert str(resolve_layout(RunConfig(model=QWEN_VL, parallel=parallel))) == "L*8|L*8|L*9|L*7"


def test_a_whole_vision_part_cannot_be_cut() -> None:
    with pytest.raises(
        ConfigError, match="'V\\*3R|L\\*3' cuts the vision tower, .* whole on every rank; cut the 3 L alone"
    ):
        parse_layout("V*3R|L*3", model=TINY, pipeline_size=2, vision_parallel="data")
    config = RunConfig(model=TINY, parallel=ParallelConfig(pipeline_model_parallel_size=5, vision_parallel="data"))
    with pytest.raises(ConfigError, match=r"5 stages, but the model has 4 units to cut: 3 L \+ the head"):
        resolve_layout(config)


def test_more_stages_than_units() -> None:
    config = RunConfig(model=TINY, parallel=ParallelConfig(pipeline_model_parallel_size=8))
    assert str(resolve_layout(config)) == "V|V|V|R|L|L|L|"
    config = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=9))
    with pytest.raises(ConfigError, match=r"9 x .* 1 = 9 stages, but the model has 8 units to cut: 3 V \+ 1 R \+ 3 L"):
        resolve_layout(config)


def test_assumed_work_is_half_images() -> None:
    work = assumed_work(RunConfig(model=QWEN_VL))
    assert work == Work(4, 2048, 2048**2, 2048 - 4 * 258)
    segments = assumed_work(RunConfig(model=QWEN_VL, data=DataConfig(attention_span="segment")))
    assert segments.sum_squared_spans == 2048**2 / 4
    assert assumed_work(RunConfig(model=QWEN_VL, data=DataConfig(seq_length=64))).num_supervised == 0
