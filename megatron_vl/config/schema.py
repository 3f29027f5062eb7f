"""What to run: one tree of frozen dataclasses.

A run is a :class:`RunConfig`, filled in this order: the defaults below, the size preset (``model.preset``), the YAML
recipe, the command line. Fields carry Megatron-LM's own names, so that ``training.train_iters`` in a recipe is
``--train-iters`` on the command line. Only sizes of the vision tower and of the resampler repeat names of the language
model; their flags have the prefixes ``--vision-`` and ``--resampler-``.

Derived values (micro-batches per step, special token ids, patches per image) are properties or live where they are
used; they are never stored, so no two fields can disagree. Each field is documented by the string under it, which is
also its ``--help`` text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VisionParallel = Literal["pipeline", "data"]
"""Where the vision part runs; see ``ParallelConfig``."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer. Defaults: OpenCLIP ViT-bigG/14 as Qwen-VL changed it (paper, Table 1)."""

    num_layers: int = 48
    """Transformer layers."""
    hidden_size: int = 1664
    """Width."""
    ffn_hidden_size: int = 8192
    """Width of the MLP."""
    num_attention_heads: int = 16
    """Attention heads."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    position_grid: int = 16
    """Side of the learned position table; it is interpolated to the grid of the image."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every LayerNorm of the vision tower and the resampler."""


@dataclass(frozen=True)
class ResamplerConfig:
    """The position-aware cross-attention adapter: one layer, learned queries."""

    num_queries: int = 256
    """Image features handed to the language model for each image; a square number."""
    num_attention_heads: int = 32
    """Attention heads; the width is the language model's."""


@dataclass(frozen=True)
class LanguageConfig:
    """The language model. Defaults: the Qwen-7B body."""

    num_layers: int = 32
    """Transformer layers of the language model."""
    hidden_size: int = 4096
    """Width of the language model."""
    ffn_hidden_size: int = 11008
    """Width of one half of the SwiGLU MLP."""
    num_attention_heads: int = 32
    """Attention heads of the language model."""
    vocab_size: int = 151936
    """Rows of the word embedding and of the output layer, at least the tokenizer's size."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    native_seq_length: int = 2048
    """Length up to which attention is plain; longer spans get the two fields below, in evaluation and generation."""
    use_dynamic_ntk: bool = True
    """Enlarge the rotary base for spans and prompts above the native length; never in training."""
    use_logn_attn: bool = True
    """Scale queries at positions above the native length by log(position) / log(native); never in training."""


@dataclass(frozen=True)
class ModelConfig:
    """What the network is."""

    preset: str = "qwen_vl_7b"
    """Sizes to start from: tiny, small or qwen_vl_7b."""
    image_size: int = 448
    """Side of the square to which every image is resized, in pixels (stage 1: 224)."""
    num_bpe_tokens: int = 151643
    """Tokens of the byte-pair vocabulary that are kept, from the most frequent; the special tokens follow them."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights; projections back into the residual stream get this / sqrt(2 x layers)."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)

    @property
    def patch_grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.vision.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.patch_grid**2


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is laid out over ranks. World size = tensor x pipeline x data."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); none for the plain schedule."""
    pipeline_layout: str = "auto"
    """Stages over the line V..V R L..L, for example 'V*24|V*24R|L*16|L*16'; 'auto' balances the computed cost."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions along the sequence as well."""
    vision_parallel: VisionParallel = "pipeline"
    """Where the vision tower and the resampler run: 'pipeline' cuts them into stages with the language model, 'data'
    holds them whole on every rank, and each rank encodes its share of a step's images."""
    vision_micro_batch_size: int = 8
    """Images that a rank encodes at a time, with vision_parallel data."""
    vision_recompute: bool = True
    """With vision_parallel data, compute activations of a trained tower again for the backward pass."""
    vision_recompute_granularity: Literal["images", "layers"] = "images"
    """What vision_recompute computes again: 'images' keeps nothing and encodes images again, 'layers' keeps the input
    of each layer of the tower."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass has begun (distributed optimizer only)."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers; auto takes Transformer Engine for bf16 on CUDA if it is installed."""
    distributed_timeout_minutes: int = 10
    """Collectives that take longer than this end the run."""


@dataclass(frozen=True)
class DataConfig:
    """Which rows are read."""

    data_path: tuple[str, ...] = ()
    """Prefixes of packed data sets, or weight and prefix in turn: 0.7 A 0.3 B."""
    valid_data_path: tuple[str, ...] = ()
    """Prefixes of validation sets; each has a validation loss of its own."""
    seq_length: int = 2048
    """Tokens in a row."""
    attention_span: Literal["row", "segment"] = "row"
    """What a token may look back at: the whole row (as the original) or its own segment."""
    num_workers: int = 2
    """Processes that decode images for each reading rank; 0 decodes in the training process."""
    blank_images: bool = False
    """Replace every image by a gray one: the control experiment that shows what the images are worth."""
    unpacked: bool = False
    """Rows hold one sample each, as in the paper's own table; the data set must have been prepared so."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    train_iters: int = 1000
    """Steps of the whole run."""
    micro_batch_size: int = 1
    """Rows in a micro-batch of one data-parallel rank."""
    global_batch_size: int = 8
    """Rows in a step over all data-parallel ranks."""
    global_batch_samples: int | None = None
    """The paper counts samples: if given, rows in a step = this / samples per row of the data set's manifest."""
    seed: int = 1234
    """Seed of initial weights and of the order of rows."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Compute the matrix products of transformer layers in FP8 while training, with Transformer Engine: e4m3 for all of
    their inputs, or hybrid, which takes e5m2 for gradients; needs bf16."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 numbers are scaled: by the largest value of the tensor, by that of earlier micro-batches, by that of
    blocks of 128, or by that of 32 numbers (Blackwell only)."""
    fp8_parts: Literal["language", "both"] = "language"
    """Which layers compute in FP8: those of the language model, or those of the vision tower as well."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers of each part that computes in FP8 in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """With first_last_layers_bf16, the number of first layers."""
    num_layers_at_end_in_bf16: int = 1
    """With first_last_layers_bf16, the number of last layers."""
    freeze_vision: bool = False
    """Do not train the vision tower."""
    freeze_resampler: bool = False
    """Do not train the resampler (with its ln_post and proj)."""
    freeze_language_model: bool = False
    """Do not train the language model."""
    legacy_finetune_freezing: bool = False
    """With freeze_vision: freeze what the released fine-tuning script froze. Unlike in the paper, the resampler's
    ln_post and proj then stay as they are, and its position table, which otherwise never changes, trains."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or the attention core only."""
    eval_interval: int = 0
    """Steps between two validation losses; 0 for none."""
    eval_iters: int = 0
    """Global batches of each validation set; 0 for all its rows."""
    max_skipped_steps: int = 10
    """Steps in a row that are skipped, since their loss or gradient is not finite, after which the run ends."""
    exit_interval: int | None = None
    """Save and stop at the next step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this time."""
    deterministic_mode: bool = False
    """Only deterministic kernels, so that two runs are bit-identical."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Defaults: what all three stages of Qwen-VL share (paper, Table 8)."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from zero."""
    lr_decay_iters: int | None = None
    """Steps until the minimum is reached; by default train_iters."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms and other vectors have none."""
    adam_beta1: float = 0.9
    """AdamW's first moment."""
    adam_beta2: float = 0.98
    """AdamW's second moment."""
    adam_eps: float = 1e-6
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0 for no clipping."""
    vision_layer_decay: float = 1.0
    """Layer-wise learning-rate decay of the vision tower: the last layer learns at lr x this."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go to and come from."""

    save: str | None = None
    """Directory that receives checkpoints."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    load: str | None = None
    """Directory to resume from: weights, optimizer, random state and data position."""
    auto_resume: bool = False
    """Go on from the newest checkpoint in save, if there is one; otherwise start as the other fields say."""
    pretrained_checkpoint: str | None = None
    """Start a stage from these weights with a fresh optimizer, step and data position."""
    finetune: bool = False
    """With load: take the weights only and start at step 0."""
    no_load_optim: bool = False
    """Do not load the optimizer."""
    no_load_rng: bool = False
    """Do not load the random state."""
    keep_last: int | None = None
    """Number of checkpoints to keep; all by default."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported."""

    log_interval: int = 10
    """Steps between log lines."""
    log_file: str | None = None
    """JSON lines of every logged step; by default metrics.jsonl in the save directory."""
    tensorboard_dir: str | None = None
    """TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; offline unless the user has logged in."""
    wandb_exp_name: str | None = None
    """Name of the run there."""
    progress: bool = True
    """Progress bar on rank 0, when the terminal is one."""
    profile: bool = False
    """Profile some steps: a trace and ranges for each rank of profile_ranks, and the times of all stages."""
    profile_step_start: int = 10
    """Steps before the first one that is profiled."""
    profile_step_end: int = 12
    """Last step that is profiled; by default steps 11 and 12 are."""
    profile_ranks: tuple[str, ...] = ("0",)
    """Global ranks that write a trace."""
    profile_dir: str | None = None
    """Directory of the profile; by default profile in the save directory."""
    use_pytorch_profiler: bool = True
    """Trace with torch's profiler; without it, NVTX ranges only, for nsys and for undisturbed times."""
    record_memory_history: bool = False
    """With profile, write a snapshot of CUDA's memory after these steps, with the history of its blocks."""


@dataclass(frozen=True)
class RunConfig:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
