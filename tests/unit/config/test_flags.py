"""Every flag of ``tools/train.py`` has a test that sees what it does.

The table names one for each. A flag without effect, or one whose effect nobody has looked at, cannot be added.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_vl.config.fields import iterate_fields

TESTS = Path(__file__).resolve().parents[2]

SIZES = "unit/model/test_build.py::test_the_built_model_has_the_planned_tensors"
LANGUAGE = "unit/model/test_blocks.py::test_language_layers_equal_qwen2"
VISION = "unit/model/test_blocks.py::test_vision_layers_equal_clip"
RESAMPLER = "unit/model/test_resampler.py::test_resampler_equals_torch_s_attention"
LONG = "unit/model/test_rotary.py::test_either_can_be_off"
LAYOUT = "parallel/test_layouts.py::test_layout_equals_one_process"
VISION_DATA = "parallel/test_layouts.py::"
ENCODER = "parallel/test_image_encoder.py::"
STAGES = "integration/test_resume.py::test_each_stage_trains_what_the_paper_trains"
ADAMW = "parallel/test_optimizer_state.py::test_every_group_follows_adamw_across_a_resume"
SCHEDULE = "unit/training/test_optimizer.py::test_decay_runs_from_the_end_of_the_warm_up_to_the_minimum"
INTERRUPTED = "integration/test_recipes.py::test_an_interrupted_run_ends_with_the_same_bytes"
FP8 = "integration/test_fp8.py::test_weights_are_quantized_anew_in_every_step"
EFFECTS = "integration/test_flags.py::"
PROFILE = "unit/training/test_profiling.py::"

SEEN_BY = {
    "--preset": "unit/config/test_load.py::test_order_is_defaults_then_preset_then_recipe_then_flags",
    "--image-size": "unit/planning/test_flops.py::test_forward_of_an_image",
    "--num-bpe-tokens": "unit/cli/test_train.py::test_check_refuses_data_of_another_model",
    "--init-method-std": "unit/model/test_build.py::test_fresh_weights_have_their_deviations",
    "--vision-num-layers": SIZES,
    "--vision-hidden-size": SIZES,
    "--vision-ffn-hidden-size": SIZES,
    "--vision-num-attention-heads": VISION,
    "--vision-patch-size": SIZES,
    "--vision-position-grid": SIZES,
    "--vision-layernorm-epsilon": VISION,
    "--resampler-num-queries": SIZES,
    "--resampler-num-attention-heads": RESAMPLER,
    "--num-layers": SIZES,
    "--hidden-size": SIZES,
    "--ffn-hidden-size": SIZES,
    "--num-attention-heads": LANGUAGE,
    "--vocab-size": "unit/model/test_build.py::test_padding_of_the_vocabulary_is_in_no_logits_and_no_loss",
    "--rotary-base": LANGUAGE,
    "--norm-epsilon": LANGUAGE,
    "--native-seq-length": "unit/model/test_rotary.py::test_every_doubling_has_one_factor",
    "--use-dynamic-ntk": LONG,
    "--use-logn-attn": LONG,
    "--tensor-model-parallel-size": LAYOUT,
    "--pipeline-model-parallel-size": LAYOUT,
    "--virtual-pipeline-model-parallel-size": LAYOUT,
    "--pipeline-layout": "unit/planning/test_layout.py::test_resolve_takes_what_is_written",
    "--sequence-parallel": LAYOUT,
    "--vision-parallel": VISION_DATA + "test_images_encoded_by_all_ranks_equal_one_process",
    "--vision-micro-batch-size": ENCODER + "test_so_many_images_are_encoded_at_a_time",
    "--vision-recompute": ENCODER + "test_nothing_is_kept_where_images_are_encoded_again",
    "--vision-recompute-granularity": ENCODER + "test_nothing_is_kept_where_images_are_encoded_again",
    "--use-distributed-optimizer": EFFECTS + "test_optimizer_and_overlap_are_what_is_built",
    "--overlap-grad-reduce": EFFECTS + "test_optimizer_and_overlap_are_what_is_built",
    "--overlap-param-gather": EFFECTS + "test_optimizer_and_overlap_are_what_is_built",
    "--backend": "unit/model/test_backend.py::test_a_backend_that_is_not_there_is_refused_with_advice",
    "--distributed-timeout-minutes": EFFECTS + "test_collectives_end_after_the_timeout",
    "--data-path": "unit/data/loading/test_loader.py::test_pixels_are_those_of_the_rows",
    "--valid-data-path": "unit/training/test_validation.py::test_losses_of_several_sets_are_those_of_each_alone",
    "--seq-length": "unit/data/loading/test_loader.py::test_a_data_set_must_fit_the_run",
    "--attention-span": "unit/data/loading/test_batch.py::test_per_segment_nothing_crosses_a_border",
    "--num-workers": "unit/data/loading/test_loader.py::test_workers_give_what_this_process_gives",
    "--blank-images": "unit/data/loading/test_loader.py::test_ranks_without_pixels_and_blank_images_decode_nothing",
    "--unpacked": "unit/data/loading/test_loader.py::test_a_data_set_must_fit_the_run",
    "--train-iters": INTERRUPTED,
    "--micro-batch-size": "unit/config/test_batch.py::test_num_microbatches",
    "--global-batch-size": "unit/config/test_batch.py::test_num_microbatches",
    "--global-batch-samples": "unit/training/test_data_plan.py::test_a_batch_in_samples_is_counted_in_rows",
    "--seed": "unit/model/test_build.py::test_fresh_weights_follow_the_seed",
    "--bf16": "parallel/test_layouts.py::test_bf16_is_as_close_to_fp32_as_one_bf16_process",
    "--fp8-format": FP8,
    "--fp8-recipe": "unit/backends/test_fp8.py::test_delayed_scaling_has_one_context_around_all_layers",
    "--fp8-parts": FP8,
    "--first-last-layers-bf16": FP8,
    "--num-layers-at-start-in-bf16": FP8,
    "--num-layers-at-end-in-bf16": FP8,
    "--freeze-vision": STAGES,
    "--freeze-resampler": STAGES,
    "--freeze-language-model": STAGES,
    "--legacy-finetune-freezing": "parallel/test_layouts.py::test_frozen_parts_equal_one_process",
    "--recompute-granularity": EFFECTS + "test_recomputation_runs_layers_again",
    "--eval-interval": INTERRUPTED,
    "--eval-iters": "unit/data/loading/test_loader.py::test_one_pass_holds_every_row_once_and_fills_up_with_padding",
    "--max-skipped-steps": (
        "integration/test_not_finite.py::test_a_run_that_only_skips_steps_ends_and_keeps_its_last_good_checkpoint"
    ),
    "--exit-interval": "unit/training/test_stopping.py::test_reasons",
    "--exit-duration-in-mins": "unit/training/test_stopping.py::test_reasons",
    "--deterministic-mode": EFFECTS + "test_deterministic_mode_is_torch_s",
    "--lr": ADAMW,
    "--min-lr": ADAMW,
    "--lr-decay-style": SCHEDULE,
    "--lr-warmup-iters": "unit/training/test_optimizer.py::test_warm_up_is_linear_and_starts_above_zero",
    "--lr-decay-iters": "unit/training/test_optimizer.py::test_decay_may_be_longer_or_shorter_than_the_run",
    "--weight-decay": ADAMW,
    "--adam-beta1": ADAMW,
    "--adam-beta2": ADAMW,
    "--adam-eps": ADAMW,
    "--clip-grad": EFFECTS + "test_gradients_are_clipped_to_the_norm",
    "--vision-layer-decay": ADAMW,
    "--save": INTERRUPTED,
    "--save-interval": INTERRUPTED,
    "--load": EFFECTS + "test_what_a_run_starts_from",
    "--auto-resume": INTERRUPTED,
    "--pretrained-checkpoint": EFFECTS + "test_what_a_run_starts_from",
    "--finetune": EFFECTS + "test_what_a_run_starts_from",
    "--no-load-optim": EFFECTS + "test_what_a_run_starts_from",
    "--no-load-rng": EFFECTS + "test_what_a_run_starts_from",
    "--keep-last": "unit/checkpoint/test_store.py::test_retention_keeps_the_newest",
    "--log-interval": "unit/training/test_metrics.py::test_reports_come_at_the_interval_and_at_the_end",
    "--log-file": "unit/training/test_metrics.py::test_a_resumed_run_goes_on_in_the_same_file",
    "--tensorboard-dir": "unit/training/test_metrics.py::test_tensorboard_has_the_scalars",
    "--wandb-project": "unit/training/test_metrics.py::test_weights_and_biases_has_the_names_and_the_metrics",
    "--wandb-exp-name": "unit/training/test_metrics.py::test_weights_and_biases_has_the_names_and_the_metrics",
    "--profile": PROFILE + "test_every_pass_of_every_stage_is_timed",
    "--profile-step-start": PROFILE + "test_every_pass_of_every_stage_is_timed",
    "--profile-step-end": PROFILE + "test_every_pass_of_every_stage_is_timed",
    "--profile-ranks": PROFILE + "test_every_pass_of_every_stage_is_timed",
    "--profile-dir": PROFILE + "test_a_profile_is_beside_the_checkpoints_unless_a_directory_is_given",
    "--use-pytorch-profiler": PROFILE + "test_every_rank_times_its_share_of_the_vision_part",
    "--record-memory-history": PROFILE + "test_a_profile_that_cannot_be_is_refused",
    "--progress": "unit/training/test_metrics.py::test_a_bar_moves_where_one_is_wanted",
}


def test_every_flag_is_in_the_table() -> None:
    assert {spec.flag for spec in iterate_fields()} == SEEN_BY.keys()


@pytest.mark.parametrize("test", sorted(set(SEEN_BY.values())))
def test_the_test_is_there(test: str) -> None:
    file, name = test.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
