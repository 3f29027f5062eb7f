"""Write a converted model as a distributed checkpoint, in one process, tensor by tensor.

The network describes its own checkpoint (built on the meta device, in a world of one), so there is one description of
what a checkpoint holds. Its tensors come from the model that is converted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl import folder_lock
from megatron_vl.checkpoint import contents, store
from megatron_vl.checkpoint.streaming import StreamingStrategy
from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.conversion.convert import ConvertedModel
from megatron_vl.errors import CheckpointError, FolderInUseError
from megatron_vl.model.build import build_on_meta
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.vocabulary import padded_vocab_size

_DTYPE_FROM = "language_model.final_layernorm.weight"


def write_checkpoint(converted: ConvertedModel, root: Path, *, progress: Callable[[int], None] | None = None) -> Path:
    """Write a model as the checkpoint of step 0 in ``root``, and return its directory.

    ``progress`` is called with the bytes of each tensor that has been read.

    Raises:
        CheckpointError: if it could not be written; then nothing was committed.
        ConversionError: if a tensor cannot be read or is not finite; then nothing was committed.
    """

    def read(name: str) -> Tensor:
        tensor = converted[name]
        if progress:
            progress(tensor.nbytes)
        return _pad_vocabulary(tensor) if converted.spec(name).is_vocabulary else tensor

    bf16 = converted.dtype(_DTYPE_FROM) == torch.bfloat16
    config = RunConfig(model=converted.model, training=TrainingConfig(bf16=bf16))
    new = not root.exists()
    try:
        with _held(root), Topology(config.parallel) as topology:
            trained = contents.Trained([build_on_meta(config, topology)], None, StreamingStrategy(read))
            return contents.save(trained, {"step": 0}, config=config, topology=topology, root=root)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                (root / store.LOCK).unlink(missing_ok=True)
                root.rmdir()
        raise


@contextlib.contextmanager
def _held(root: Path) -> Iterator[None]:
    """Lock the directory: a save there removes what an earlier save has left unfinished."""
    try:
        with folder_lock.hold(root, store.LOCK):
            yield
    except FolderInUseError as holder:
        raise CheckpointError(
            f"{root}: a training or another import saves there ({holder}); wait for it, or choose another directory"
        ) from holder


def _pad_vocabulary(tensor: Tensor) -> Tensor:
    padding = padded_vocab_size(tensor.shape[0], 1) - tensor.shape[0]
    return F.pad(tensor, (0, 0, 0, padding)) if padding else tensor
