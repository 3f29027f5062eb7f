"""Count the bytes of the tensors that live.

Every tensor that torch makes passes through its dispatcher, also in backward passes. A weak reference to its storage
tells when it is free. So the sum is exact, with the views of a storage counted once. What a kernel needs only inside a
call is no tensor that passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that tensors have; those that were made before it has begun do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._most = 0
        """What would live if nothing had been freed since the last look."""
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return result

    def now(self) -> int:
        """Return what lives."""
        self._storages = {key: own for key, own in self._storages.items() if not own[0].expired()}
        self._most = sum(size for _, size in self._storages.values())
        return self._most

    def restart(self) -> int:
        """Forget the peak; return what lives."""
        self.peak = self.now()
        return self.peak

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # no other storage can have it while a weak reference is held
        if key in self._storages:
            return
        self._storages[key] = StorageWeakRef(storage), storage.nbytes()
        self._most += storage.nbytes()
        if self._most > self.peak:
            self.peak = max(self.peak, self.now())
