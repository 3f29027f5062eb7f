"""What a check on a device finds: a number, and how large it may be.

Tests assert it, and ``benchmarks/gpu.py`` reports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """How far one thing is from what it should be."""

    name: str
    found: float
    allowed: float

    @property
    def met(self) -> bool:
        """Small enough; a NaN never is."""
        return self.found <= self.allowed


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return float((found - exact).norm() / exact.norm())


def relative_over(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, prefix: str = "") -> float:
    """The same over all tensors whose name begins with ``prefix``, as if they were one."""
    assert found.keys() == exact.keys(), sorted(found.keys() ^ exact.keys())
    names = [name for name in exact if name.startswith(prefix)]
    assert names, prefix
    return relative(_line(found[name] for name in names), _line(exact[name] for name in names))


def assert_met(differences: Iterable[Difference]) -> None:
    """Raise with all that are too large."""
    wrong = [difference for difference in differences if not difference.met]
    assert not wrong, wrong


def _line(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().cpu().flatten() for tensor in tensors])
