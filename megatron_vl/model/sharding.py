"""Modules that name their tensors for distributed checkpoints.

Layers are kept in ``ModuleDict``s under their global number. Megatron-Core's default recursion does not enter these: it
would save their tensor-parallel shards as if they were replicas. :class:`ShardedModule` walks the module tree itself.
Megatron-Core's modules describe themselves; everything else is replicated over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import nn


class ShardedModule(nn.Module):
    """A module whose children may be Megatron-Core's, plain, or containers of either."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.groups = groups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return every parameter and persistent buffer as a ShardedTensor, under its global name."""
        return _sharded(self, prefix, groups=self.groups, metadata=metadata)


def _sharded(
    module: nn.Module, prefix: str, *, groups: ProcessGroupCollection, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    own: dict[str, Any] = dict(module.named_parameters(recurse=False))
    own |= {
        name: value
        for name, value in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        own, prefix, {}, tp_group=groups.tp, dp_cp_group=groups.dp_cp
    )
    for name, child in module.named_children():
        if hasattr(child, "sharded_state_dict") and not isinstance(child, ShardedModule):
            described = sharded_state_dict_default(child, f"{prefix}{name}.", (), metadata, tp_group=groups.tp)
            result.update(described)
        else:
            result.update(_sharded(child, f"{prefix}{name}.", groups=groups, metadata=metadata))
    return result
