"""What other trainers call our fields, so that a flag from a user's old script is answered with ours.

The names are those of Hugging Face's trainer, of the released Qwen-VL scripts, of DeepSpeed and of common speech. A
name that stands for nothing here gets a sentence instead of a field. So does a lever of Megatron-Core that this trainer
does not have, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

FIELDS: Mapping[str, str] = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_learning_rate": "optimizer.min_lr",
    "lr_min": "optimizer.min_lr",
    "lr_scheduler_type": "optimizer.lr_decay_style",
    "lr_scheduler": "optimizer.lr_decay_style",
    "warmup": "optimizer.lr_warmup_iters",
    "warmup_steps": "optimizer.lr_warmup_iters",
    "warmup_iters": "optimizer.lr_warmup_iters",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "adam_epsilon": "optimizer.adam_eps",
    "eps": "optimizer.adam_eps",
    "max_grad_norm": "optimizer.clip_grad",
    "grad_clip": "optimizer.clip_grad",
    "gradient_clipping": "optimizer.clip_grad",
    "layerwise_lr_decay": "optimizer.vision_layer_decay",
    "layer_decay": "optimizer.vision_layer_decay",
    "steps": "training.train_iters",
    "iters": "training.train_iters",
    "max_steps": "training.train_iters",
    "num_steps": "training.train_iters",
    "train_steps": "training.train_iters",
    "max_iters": "training.train_iters",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "train_samples_per_step": "training.global_batch_samples",
    "per_device_train_batch_size": "training.micro_batch_size",
    "mbs": "training.micro_batch_size",
    "gbs": "training.global_batch_size",
    "gradient_checkpointing": "training.recompute_granularity",
    "activation_checkpointing": "training.recompute_granularity",
    "recompute_activations": "training.recompute_granularity",
    "recompute": "training.recompute_granularity",
    "memory_snapshot_path": "logging.profile_dir",
    "transformer_impl": "parallel.backend",
    "eval_steps": "training.eval_interval",
    "random_seed": "training.seed",
    "deterministic": "training.deterministic_mode",
    "bfloat16": "training.bf16",
    "fp8": "training.fp8_format",
    "fp8_hybrid": "training.fp8_format",
    "fp8_e4m3": "training.fp8_format",
    "fp8_scaling": "training.fp8_recipe",
    "fix_vit": "training.freeze_vision",
    "freeze_vit": "training.freeze_vision",
    "freeze_llm": "training.freeze_language_model",
    "freeze_lm": "training.freeze_language_model",
    "model_max_length": "data.seq_length",
    "max_length": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "max_seq_len": "data.seq_length",
    "seq_len": "data.seq_length",
    "data": "data.data_path",
    "dataset": "data.data_path",
    "train_data": "data.data_path",
    "train_data_path": "data.data_path",
    "eval_data_path": "data.valid_data_path",
    "valid_data": "data.valid_data_path",
    "val_data_path": "data.valid_data_path",
    "dataloader_num_workers": "data.num_workers",
    "workers": "data.num_workers",
    "output_dir": "checkpoint.save",
    "output": "checkpoint.save",
    "save_dir": "checkpoint.save",
    "checkpoint_dir": "checkpoint.save",
    "save_steps": "checkpoint.save_interval",
    "save_every": "checkpoint.save_interval",
    "save_total_limit": "checkpoint.keep_last",
    "resume": "checkpoint.auto_resume",
    "resume_from_checkpoint": "checkpoint.load",
    "model_name_or_path": "checkpoint.pretrained_checkpoint",
    "init_checkpoint": "checkpoint.pretrained_checkpoint",
    "logging_steps": "logging.log_interval",
    "logging_dir": "logging.tensorboard_dir",
    "report_to": "logging.wandb_project",
    "run_name": "logging.wandb_exp_name",
    "tp": "parallel.tensor_model_parallel_size",
    "tp_size": "parallel.tensor_model_parallel_size",
    "tensor_parallel_size": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "pp_size": "parallel.pipeline_model_parallel_size",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "zero": "parallel.use_distributed_optimizer",
    "zero_stage": "parallel.use_distributed_optimizer",
    "model": "model.preset",
    "model_preset": "model.preset",
    "model_size": "model.preset",
    "image_resolution": "model.image_size",
    "resolution": "model.image_size",
}
"""Field by the name that it has elsewhere, with underscores."""

_EPOCHS = (
    "A run counts steps, not epochs: set training.train_iters (--train-iters). --dry-run says how often it takes each "
    "row"
)
_ACCUMULATION = (
    "A step has training.global_batch_size rows (--global-batch-size); micro-batches follow from it, from "
    "training.micro_batch_size and from the number of ranks"
)
_RANKS = "Data-parallel ranks are what tensor and pipeline parallelism leave of the ranks that the launcher starts"
_NO_LORA = (
    "There are no LoRA adapters: a run trains whole parts (see --freeze-vision, --freeze-resampler and "
    "--freeze-language-model)"
)
_NO_CONTEXT = (
    "There is no context parallelism: it splits long rows over ranks, and rows of the recipes have 2,048 tokens. A "
    "split would also cut packed segments and images in two. Less memory is needed with --sequence-parallel, which "
    "splits the activations of a row over tensor-parallel ranks, or with --recompute-granularity full"
)
_NO_TP_OVERLAP = (
    "Collectives of tensor parallelism are not overlapped with the products beside them: that takes user buffers of "
    "Transformer Engine, which exclude expandable segments of memory and which no test here can run. They cost least "
    "at --tensor-model-parallel-size 1 or 2, which tools/plan.py compares"
)
_NO_PRECISION_AWARE = (
    "Masters, gradients and moments are fp32: only the optimizer of Transformer Engine has other types, and a "
    "checkpoint is to load with any backend. parallel.use_distributed_optimizer (--use-distributed-optimizer) divides "
    "masters and moments by the number of data-parallel ranks"
)
_FP32_GRADIENTS = "Gradients are always summed and reduced in fp32: leave this out"
_FULL_IS_UNIFORM = (
    "--recompute-granularity full recomputes every layer by itself, as Megatron-LM does with the method uniform and "
    "one layer: leave this out. A part of the layers cannot be chosen; tools/plan.py finds a layout that needs less"
)
_SELECTIVE_IS_CORE = (
    "--recompute-granularity selective recomputes the core of attention, Megatron-LM's module core_attn, and no other "
    "module can be chosen; --recompute-granularity full recomputes whole layers"
)
_MESSAGES = "Messages between stages overlap with computation where there are virtual stages, and only there"
_CHUNKS = (
    "Give the number of model chunks of a pipeline rank instead of their layers: "
    "parallel.virtual_pipeline_model_parallel_size (--num-virtual-stages-per-pipeline-rank)"
)
_NO_FP16 = "Precision is bfloat16 (training.bf16, --bf16), with FP8 beside it (--fp8-format), or float32"

NOTES: Mapping[str, str] = {
    "num_train_epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "data_parallel_size": _RANKS,
    "dp": _RANKS,
    "dp_size": _RANKS,
    "use_lora": _NO_LORA,
    "q_lora": _NO_LORA,
    "fp16": _NO_FP16,
    "half": _NO_FP16,
    "deepspeed": "There is no DeepSpeed: parallel.use_distributed_optimizer shards the optimizer",
    "gpus": "The launcher starts the ranks: torchrun --nproc-per-node N, or GPUS_PER_NODE=N with the script",
    "num_gpus": "The launcher starts the ranks: torchrun --nproc-per-node N, or GPUS_PER_NODE=N with the script",
    "context_parallel_size": _NO_CONTEXT,
    "cp_size": _NO_CONTEXT,
    "cp": _NO_CONTEXT,
    "cp_comm_type": _NO_CONTEXT,
    "tp_comm_overlap": _NO_TP_OVERLAP,
    "overlap_p2p_communication": _MESSAGES,
    "no_overlap_p2p_communication": _MESSAGES,
    "use_precision_aware_optimizer": _NO_PRECISION_AWARE,
    "main_grads_dtype": _NO_PRECISION_AWARE,
    "main_params_dtype": _NO_PRECISION_AWARE,
    "exp_avg_dtype": _NO_PRECISION_AWARE,
    "exp_avg_sq_dtype": _NO_PRECISION_AWARE,
    "accumulate_allreduce_grads_in_fp32": _FP32_GRADIENTS,
    "grad_reduce_in_bf16": _FP32_GRADIENTS,
    "recompute_method": _FULL_IS_UNIFORM,
    "recompute_num_layers": _FULL_IS_UNIFORM,
    "recompute_modules": _SELECTIVE_IS_CORE,
    "num_layers_per_virtual_pipeline_stage": _CHUNKS,
    "nvtx_ranges": "--profile marks its steps and passes with NVTX ranges, always",
}
"""Names that stand for no single field, and what to do instead."""


def note(name: str) -> str | None:
    """Return what to say of ``name`` where it stands for no field; None if nothing is known of it."""
    for begins, text in (("lora", _NO_LORA), ("tp_comm_", _NO_TP_OVERLAP)):
        if name.startswith(begins):
            return text
    return NOTES.get(name)
