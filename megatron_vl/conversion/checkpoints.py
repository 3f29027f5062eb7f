"""Our side of a conversion: distributed checkpoints, read and written by one process.

Reading needs no model and no process group: a distributed checkpoint holds each tensor under its global name
with its global shape, so :class:`CheckpointTensors` fetches them one by one, whatever layout wrote them;
optimizer state and progress stay where they are. Writing lets the network describe its own checkpoint (built
on the meta device, in a world of one) and fills in the tensors, so there is one description of what a
checkpoint holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vl.backends import safe_metadata
from megatron_vl.backends.platform import prepare_process
from megatron_vl.checkpoint import contents, store
from megatron_vl.config.schema import ModelConfig, RunConfig, TrainingConfig
from megatron_vl.conversion.convert import ImportedModel
from megatron_vl.model.build import build_on_meta
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.vocabulary import padded_vocab_size

_OPTIMIZER_PREFIX = "optimizer."


class CheckpointTensors(Mapping[str, Tensor]):
    """The model's tensors in a distributed checkpoint, under our names; each is read when asked for."""

    def __init__(self, checkpoint: Path) -> None:
        """``checkpoint`` is a committed checkpoint; see :func:`open_checkpoint`."""
        self.model: ModelConfig = contents.read_config(checkpoint).model
        safe_metadata.install()
        self._reader = _OnceReader(str(checkpoint))
        self._tensors = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_OPTIMIZER_PREFIX)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._tensors[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, vocabulary padding included."""
        return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in self._tensors.values())


def open_checkpoint(path: Path) -> CheckpointTensors:
    """Open a checkpoint, or the newest one in a directory of checkpoints, after comparing its files' sizes.

    Raises:
        CheckpointError: there is none, or a file is missing or truncated.
    """
    checkpoint = store.resolve(path)
    store.verify(checkpoint, hashes=False)
    return CheckpointTensors(checkpoint)


def write_checkpoint(
    imported: ImportedModel, root: Path, *, progress: Callable[[int], None] | None = None
) -> Path:
    """Write an imported model as the checkpoint of step 0 in ``root``; returns its directory.

    ``progress`` is called with the bytes of each tensor that has been read.

    Raises:
        CheckpointError: it could not be written; nothing was committed.
        ConversionError: a tensor of the imported folder cannot be read or is not finite.
    """
    prepare_process()
    bf16 = imported.dtype("language_model.final_layernorm.weight") == torch.bfloat16
    config = RunConfig(model=imported.model, training=TrainingConfig(bf16=bf16))
    with Topology(config.parallel) as topology:
        filled = _Filled(build_on_meta(config, topology).sharded_state_dict(), imported, progress)
        return contents.save(contents.Trained([filled], None), {"step": 0}, config=config, topology=topology, root=root)


class _OnceReader(FileSystemReader):
    """Reads the metadata once for all tensors."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


@dataclass(frozen=True)
class _Filled:
    """A model chunk as a checkpoint sees it: the network's description with an imported model's tensors."""

    description: dict[str, Any]
    imported: ImportedModel
    progress: Callable[[int], None] | None

    def sharded_state_dict(self) -> dict[str, Any]:
        """Every entry of the description, tensors filled in."""
        return {name: self._fill(name, entry) for name, entry in self.description.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Nothing is ever loaded into a description."""
        raise TypeError("an imported model is written, not loaded")

    def _fill(self, name: str, entry: Any) -> Any:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            return entry
        tensor = self.imported[name]
        if self.progress:
            self.progress(tensor.numel() * tensor.element_size())
        if self.imported.spec(name).is_vocabulary:
            padding = padded_vocab_size(tensor.shape[0], 1) - tensor.shape[0]
            tensor = F.pad(tensor, (0, 0, 0, padding))
        if isinstance(entry, ShardedTensor):
            return replace(entry, data=tensor, dtype=tensor.dtype)
        return replace(entry, data=tensor)
