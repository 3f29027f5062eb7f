"""A parameter is read in the forward pass of the module that owns it, as gathering while the pass runs demands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config


class _Reads(TorchFunctionMode):
    """Records parameters that an operation takes before the module that owns them has been called."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        super().__init__()
        self.early: set[str] = set()
        self._waiting: dict[int, str] = {}
        self.count = 0
        for prefix, module in chunk.named_modules():
            own = {
                parameter.untyped_storage().data_ptr(): f"{prefix}.{name}"
                for name, parameter in module.named_parameters(recurse=False)
            }
            self._waiting |= own
            self.count += len(own)
            module.register_forward_pre_hook(lambda *_, own=own: self._called(own))

    @property
    def never_called(self) -> set[str]:
        return set(self._waiting.values())

    def _called(self, own: dict[int, str]) -> None:
        for key in own:
            self._waiting.pop(key, None)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__ != "__get__":  # of a type or a device
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            found = [self._waiting.get(tensor.untyped_storage().data_ptr()) for tensor in tensors]
            self.early |= {name for name in found if name}
        return function(*args, **kwargs)


def reads_on_rank(start: Start, config: RunConfig) -> tuple[int, set[str], set[str]]:
    """How many parameters there are; which are read early; and which belong to a module that is never called."""
    with start.topology(config.parallel) as topology:
        (chunk,) = build_model(config, topology)
        with _Reads(chunk) as reads:
            chunk(micro_batches(config.model, 1)[0]).sum().backward()
        return reads.count, reads.early, reads.never_called


def test_no_parameter_is_read_before_its_module_is_called(ranks: RankPools) -> None:
    count, early, never_called = ranks(1).run(reads_on_rank, tiny_config())[0]
    assert count > 50 and early == never_called == set()
