"""Check that a checkpoint is of the model that a run builds, from two configurations, without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.config.schema import ModelConfig
from megatron_vl.errors import CheckpointError

_NO_WEIGHT_DEPENDS_ON = frozenset({"native_seq_length", "use_dynamic_ntk", "use_logn_attn"})


def check_same_model(wanted: ModelConfig, saved: ModelConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose sizes are not the run's.

    The image size may differ, and so may what evaluation changes above the native length: no weight depends on them.

    Raises:
        CheckpointError: if sizes differ; lists all of them.
    """
    differences = []
    for part in ("vision", "resampler", "language"):
        ours, theirs = vars(getattr(wanted, part)), vars(getattr(saved, part))
        differences += [
            f"{part}.{name} is {theirs[name]} in the checkpoint and {value} in this run"
            for name, value in ours.items()
            if theirs[name] != value and name not in _NO_WEIGHT_DEPENDS_ON
        ]
    if wanted.num_bpe_tokens != saved.num_bpe_tokens:
        differences.append(
            f"num_bpe_tokens is {saved.num_bpe_tokens} in the checkpoint and {wanted.num_bpe_tokens} in this run"
        )
    if differences:
        raise CheckpointError(f"{checkpoint} is of another model: " + "; ".join(differences))
