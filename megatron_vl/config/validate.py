"""What the type of a field cannot say: checks over several fields, each in one small function.

A check raises ``ConfigError`` with the dotted keys and the arithmetic, and changes nothing. ``validate`` needs no
torch and no data, so that a launcher can refuse an impossible run before it has started anything. What only the data
or the device can tell is checked separately by :func:`check_device` and
:func:`megatron_vl.config.data_files.check_data_files`.
"""

from __future__ import annotations

import math

from megatron_vl.config.batch import data_parallel_size, num_microbatches
from megatron_vl.config.data_files import TINY_COMMANDS
from megatron_vl.config.fields import iterate_fields
from megatron_vl.config.fp8 import check_fp8
from megatron_vl.config.profile import check_profile
from megatron_vl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.config.validation_sets import validation_sets
from megatron_vl.errors import ConfigError

MAX_PARAMETERS_ON_CPU = 1_000_000_000

MAY_BE_ZERO = frozenset({
    "data.num_workers", "training.seed", "training.eval_interval", "training.eval_iters", "optimizer.min_lr",
    "optimizer.lr_warmup_iters", "optimizer.weight_decay", "optimizer.adam_beta1", "optimizer.adam_beta2",
    "optimizer.clip_grad", "logging.profile_step_start", "training.num_layers_at_start_in_bf16",
    "training.num_layers_at_end_in_bf16",
})  # fmt: skip
"""Numbers for which zero means something; every other number is above zero."""


def validate(config: RunConfig, *, world_size: int, cuda: bool) -> None:
    """Check everything that needs neither data nor a device; raises ``ConfigError`` for the first thing wrong."""
    check_ranges(config)
    check_vision(config.model)
    check_attention_heads(config.model)
    check_vocabulary(config.model)
    check_tensor_parallel(config.model, config.parallel)
    check_sequence_parallel(config)
    check_world_size(config, world_size)
    check_batch(config, world_size)
    check_overlap(config.parallel)
    check_whole_vision(config)
    check_backend(config, cuda=cuda)
    check_fp8(config, cuda=cuda)
    check_row(config)
    check_trainable(config)
    check_legacy_freezing(config.training)
    check_schedule(config)
    check_checkpoints(config)
    check_validation(config)
    check_profile(config, world_size, cuda=cuda)


def check_ranges(config: RunConfig) -> None:
    """Every number is positive, or at least not negative."""
    for spec in iterate_fields():
        value: object = config
        for name in spec.path:
            value = getattr(value, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        zero = spec.dotted in MAY_BE_ZERO
        if value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{spec.dotted} is {value}; expected a number {'not below' if zero else 'above'} 0")


def check_vision(model: ModelConfig) -> None:
    """Whole patches, and a square grid of queries."""
    if model.image_size % model.vision.patch_size:
        patch = model.vision.patch_size
        raise ConfigError(
            f"model.image_size {model.image_size} is not a multiple of model.vision.patch_size {patch}: "
            f"{model.image_size} = {model.image_size // patch} x {patch} + {model.image_size % patch}"
        )
    queries = model.resampler.num_queries
    if math.isqrt(queries) ** 2 != queries:
        side = math.isqrt(queries)
        raise ConfigError(
            f"model.resampler.num_queries {queries} is not a square, but the queries form a square grid; the nearest "
            f"that are: {side**2} and {(side + 1) ** 2}"
        )


def check_attention_heads(model: ModelConfig) -> None:
    """Heads divide their width, and rotary and sin-cos positions can pair their dimensions."""
    hidden = model.language.hidden_size
    towers = (
        ("model.vision", model.vision.hidden_size, model.vision.num_attention_heads),
        ("model.resampler", hidden, model.resampler.num_attention_heads),
        ("model.language", hidden, model.language.num_attention_heads),
    )
    for name, width, heads in towers:
        if width % heads:
            raise ConfigError(
                f"{name}.num_attention_heads {heads} does not divide its width {width}: "
                f"{width} = {width // heads} x {heads} + {width % heads}"
            )
    head_size = hidden // model.language.num_attention_heads
    if head_size % 2:
        raise ConfigError(
            f"a head of the language model is {hidden} / {model.language.num_attention_heads} = {head_size} wide; "
            "the rotary embedding needs an even width"
        )
    if hidden % 4:
        raise ConfigError(f"model.language.hidden_size {hidden} is not a multiple of 4 (2-D sin-cos positions)")


def check_vocabulary(model: ModelConfig) -> None:
    """Every token has a row in the word embedding."""
    needed = SpecialTokens(model.num_bpe_tokens).num_tokens
    if model.language.vocab_size < needed:
        raise ConfigError(
            f"model.language.vocab_size {model.language.vocab_size} is less than the tokenizer's {needed} tokens: "
            f"model.num_bpe_tokens {model.num_bpe_tokens} + {needed - model.num_bpe_tokens} special tokens"
        )


def check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Heads and widths of what is split can be split evenly over tensor-parallel ranks."""
    vision = [
        ("model.vision.num_attention_heads", model.vision.num_attention_heads),
        ("model.vision.hidden_size", model.vision.hidden_size),
        ("model.vision.ffn_hidden_size", model.vision.ffn_hidden_size),
    ]
    language = [
        ("model.language.num_attention_heads", model.language.num_attention_heads),
        ("model.language.hidden_size", model.language.hidden_size),
        ("model.language.ffn_hidden_size", model.language.ffn_hidden_size),
    ]
    sizes = language if parallel.vision_parallel == "data" else vision + language
    tensor = parallel.tensor_model_parallel_size
    for name, size in sizes:
        if size % tensor:
            raise ConfigError(
                f"{name} {size} cannot be split over parallel.tensor_model_parallel_size {tensor} ranks: "
                f"{size} = {size // tensor} x {tensor} + {size % tensor}"
            )


def check_sequence_parallel(config: RunConfig) -> None:
    """Patches and tokens can be split evenly as well."""
    tensor = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel:
        return
    if tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel splits the sequence over tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size is 1"
        )
    sizes = [(f"data.seq_length {config.data.seq_length}", config.data.seq_length)]
    if config.parallel.vision_parallel == "pipeline":
        side, patches = config.model.patch_grid, config.model.num_patches
        sizes.append((f"the {patches} patches of an image ({side} x {side})", patches))
    for name, size in sizes:
        if size % tensor:
            raise ConfigError(
                f"parallel.sequence_parallel: {name} cannot be split over {tensor} tensor-parallel ranks: "
                f"{size} = {size // tensor} x {tensor} + {size % tensor}"
            )


def check_world_size(config: RunConfig, world_size: int) -> None:
    """The ranks form whole copies of the model, and virtual stages need a pipeline."""
    data_parallel_size(config.parallel, world_size)
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual is None:
        return
    if config.parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size {virtual} interleaves the stages of a pipeline, but "
            "parallel.pipeline_model_parallel_size is 1"
        )
    if virtual == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size 1 is the plain schedule; leave it out, or give 2 or more"
        )


def check_batch(config: RunConfig, world_size: int) -> None:
    """The global batch is a whole number of micro-batches.

    A batch that is counted in samples is known in rows only when the manifest has been read: the trainer then calls
    :func:`megatron_vl.config.batch.with_rows` and this check again.
    """
    if config.training.global_batch_samples is not None:
        return
    parallel = config.parallel
    data_parallel = data_parallel_size(parallel, world_size)
    micro_batches = num_microbatches(config.training, data_parallel)
    pipeline = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and micro_batches % pipeline:
        raise ConfigError(
            f"a virtual pipeline needs micro-batches in multiples of parallel.pipeline_model_parallel_size {pipeline}, "
            f"but training.global_batch_size {config.training.global_batch_size} / (micro_batch_size "
            f"{config.training.micro_batch_size} x data-parallel size {data_parallel}) = {micro_batches}"
        )


def check_overlap(parallel: ParallelConfig) -> None:
    """Parameters are gathered only by the distributed optimizer, and only after overlapped reductions."""
    for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, needed):
            raise ConfigError(f"parallel.overlap_param_gather needs parallel.{needed}, which is false")


def check_whole_vision(config: RunConfig) -> None:
    """What concerns a vision part on every rank is given only where there is one."""
    parallel, usual = config.parallel, ParallelConfig()
    if parallel.vision_parallel == "data":
        granularity = parallel.vision_recompute_granularity
        if granularity != usual.vision_recompute_granularity and not parallel.vision_recompute:
            raise ConfigError(
                f"parallel.vision_recompute_granularity {granularity} has no effect without parallel.vision_recompute, "
                "which is false: leave one of the two out"
            )
        return
    for name in ("vision_micro_batch_size", "vision_recompute", "vision_recompute_granularity"):
        if getattr(parallel, name) != getattr(usual, name):
            raise ConfigError(
                f"parallel.{name} {getattr(parallel, name)} has no effect where the vision part is in the pipeline: "
                "leave it out, or add --vision-parallel data"
            )


def check_backend(config: RunConfig, *, cuda: bool) -> None:
    """Transformer Engine runs on CUDA only."""
    if config.parallel.backend == "transformer_engine" and not cuda:
        raise ConfigError(
            "parallel.backend is transformer_engine, which needs CUDA, and no CUDA device was found; use auto or local"
        )


def check_row(config: RunConfig) -> None:
    """A row has room for an image with its two markers and one token of text."""
    needed = config.model.resampler.num_queries + 3
    if config.data.seq_length < needed:
        raise ConfigError(
            f"data.seq_length {config.data.seq_length} has no room for an image: model.resampler.num_queries "
            f"{config.model.resampler.num_queries} + 2 markers + 1 token of text = {needed}"
        )


def check_trainable(config: RunConfig) -> None:
    """Something is left to train."""
    training = config.training
    if training.freeze_vision and training.freeze_resampler and training.freeze_language_model:
        raise ConfigError(
            "training.freeze_vision, training.freeze_resampler and training.freeze_language_model are all true: "
            "nothing is left to train"
        )


def check_legacy_freezing(training: TrainingConfig) -> None:
    """The released fine-tuning script's choice belongs to stage 3, which freezes the vision tower alone."""
    if not training.legacy_finetune_freezing:
        return
    expected = {"freeze_vision": True, "freeze_resampler": False, "freeze_language_model": False}
    wrong = [f"training.{name} is {str(not value).lower()}" for name, value in expected.items()
             if getattr(training, name) != value]  # fmt: skip
    if wrong:
        raise ConfigError(
            "training.legacy_finetune_freezing stands for what the released fine-tuning script trained: the language "
            "model and the resampler without its ln_post and proj, but with its position table; the vision tower is "
            f"frozen. But {' and '.join(wrong)}. Set freeze_vision alone of the three, or leave the option out"
        )


def check_schedule(config: RunConfig) -> None:
    """Warm-up and decay fit into the run, and the moments are averages."""
    optimizer, train_iters = config.optimizer, config.training.train_iters
    end = optimizer.lr_decay_iters or train_iters
    name = "optimizer.lr_decay_iters" if optimizer.lr_decay_iters else "training.train_iters"
    if optimizer.lr_warmup_iters > end:
        raise ConfigError(
            f"optimizer.lr_warmup_iters {optimizer.lr_warmup_iters} exceeds {name} {end}: the learning rate would "
            "never reach its peak"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"optimizer.min_lr {optimizer.min_lr:g} exceeds optimizer.lr {optimizer.lr:g}")
    _check_fractions(optimizer)


def _check_fractions(optimizer: OptimizerConfig) -> None:
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, name) >= 1:
            raise ConfigError(f"optimizer.{name} is {getattr(optimizer, name):g}; expected a number below 1")
    if optimizer.vision_layer_decay > 1:
        raise ConfigError(
            f"optimizer.vision_layer_decay is {optimizer.vision_layer_decay:g}; expected a number up to 1 (1 for none)"
        )


def check_checkpoints(config: RunConfig) -> None:
    """Where the weights come from is unambiguous, and options have the directory they need."""
    checkpoint = config.checkpoint
    if checkpoint.pretrained_checkpoint and checkpoint.load:
        raise ConfigError(
            f"checkpoint.load {checkpoint.load} (go on with that run) and checkpoint.pretrained_checkpoint "
            f"{checkpoint.pretrained_checkpoint} (start a stage from those weights) are both given: give one of the "
            "two. To start a stage once and go on with it ever after, give pretrained_checkpoint, save and auto_resume"
        )
    for name in ("finetune", "no_load_optim", "no_load_rng"):
        if getattr(checkpoint, name) and not checkpoint.load:
            raise ConfigError(f"checkpoint.{name} is true, but checkpoint.load names no directory to load from")
    if checkpoint.auto_resume and not checkpoint.save:
        raise ConfigError("checkpoint.auto_resume is given, but checkpoint.save names no directory to save to")


def check_validation(config: RunConfig) -> None:
    """Validation steps have validation data, and each set a name."""
    validation_sets(config)
    if config.training.eval_interval and not config.data.valid_data_path:
        raise ConfigError(
            f"training.eval_interval is {config.training.eval_interval}, but data.valid_data_path is empty"
        )


def check_device(num_parameters: int, *, cuda: bool) -> None:
    """A model of billions of parameters is not trained without CUDA; raises ``ConfigError``."""
    if num_parameters > MAX_PARAMETERS_ON_CPU and not cuda:
        raise ConfigError(
            f"the model has {num_parameters:,} parameters and no CUDA device was found; without one, models of up to "
            f"{MAX_PARAMETERS_ON_CPU:,} can be trained.\n{TINY_COMMANDS}"
        )
