"""Compute with the shapes of floating-point tensors alone.

Inside :class:`Hollow`, every new floating-point tensor lies on the meta device, whatever device was asked for: it has a
shape and a type, and no memory. So a model of any size is built, trained and updated in the memory of its Python
objects. What touches such a tensor has no contents either.

Integers and booleans are real tensors on the CPU. They are few and small, and the code reads them: shapes that travel
with messages, objects that ranks exchange, lengths of spans, counts of tokens. torch's fake tensors have no contents in
either case, so Megatron-Core's schedules cannot run with them.

Where the code reads a number from a tensor without contents (a norm, the loss), it gets 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_META = "meta"
_aten = torch.ops.aten
_FACTORIES = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.zeros.default,
        _aten.ones.default,
        _aten.full.default,
        _aten.eye.default,
        _aten.arange.default,
        _aten.arange.start,
        _aten.arange.start_step,
    }
)
_NORMS = frozenset({_aten.norm, _aten.linalg_vector_norm})
_READ = _aten._local_scalar_dense.default
_COPY, _CONVERT = _aten.copy_.default, _aten._to_copy.default


class Hollow(TorchDispatchMode):
    """A context in which floating-point tensors have no contents."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation. torch fixes the signature."""
        named = dict(kwargs or {})
        if any(map(_is_hollow, args)) or any(map(_is_hollow, named.values())):
            return _on_shapes(func, args, named)
        if func in _FACTORIES and _asked_for(args, named).is_floating_point:
            named["device"] = _META
        elif (
            func is _CONVERT and not args[0].is_floating_point() and (named.get("dtype") or torch.int).is_floating_point
        ):
            named["device"] = _META  # pixels become numbers: as large as the images
        return func(*args, **named)


def _is_hollow(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    return isinstance(value, list | tuple) and any(map(_is_hollow, value))


def _asked_for(args: tuple[Any, ...], named: dict[str, Any]) -> torch.dtype:
    """Return the type of what a factory makes. Only ``full`` and ``arange`` take it from their numbers."""
    dtype: torch.dtype | None = named.get("dtype")
    if dtype is not None:
        return dtype
    numbers = [value for value in args if isinstance(value, int | float) and not isinstance(value, bool)]
    if args and numbers:
        return torch.get_default_dtype() if any(isinstance(value, float) for value in numbers) else torch.int64
    return torch.get_default_dtype()


def _on_shapes(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Run an operation of which at least one tensor has no contents."""
    if func is _READ:
        return 1.0 if args[0].dtype.is_floating_point else 1
    if func.overloadpacket in _NORMS and not torch.is_grad_enabled():
        return torch.ones((), dtype=args[0].dtype, device="cpu")  # optimizers make a tensor of such numbers
    if func is _COPY and not args[0].is_meta:
        return args[0]  # contents that do not exist change nothing
    if named.get("device") is not None:
        named["device"] = _META
    return func(*map(_emptied, args), **{name: _emptied(value) for name, value in named.items()})


def _emptied(value: Any) -> Any:
    """Return an argument without the contents of its tensors."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(_META)
    if isinstance(value, list | tuple):
        return [_emptied(item) for item in value]
    return value
