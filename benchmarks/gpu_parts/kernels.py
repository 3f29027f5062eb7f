"""The kernels of a step by class: matrix products, attention, norms, the optimizer, copies, messages, and the rest.

Kernels are known by their names alone; the first class that knows one takes it. Names of operators on a CPU are known
as well, so that this can be tested there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_CLASSES = (
    ("communication", r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention|mha_"),
    ("matmul", r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|::(add|ba)?d?d?mm(_|$|\b)|::bmm|::mm\b|::addmm"),
    ("optimizer", r"adam|multi_tensor|foreach|lamb"),
    ("norm", r"norm|rms|ln_(fwd|bwd)|gammabeta"),
    ("cross-entropy", r"softmax|nll_loss|cross_entropy|logsumexp"),
    ("copies", r"memcpy|memset|copy|::_?to\b|cat(array|_|\b)|index|gather|scatter|embedding|clone|fill"),
    ("elementwise", r"elementwise|vectorized|triton|reduce|gelu|silu|::(add|mul|div|sub|sum|neg|sqrt|cos|sin)_?\b"),
)
NAMES = tuple(name for name, _ in _CLASSES) + ("other",)


def class_of(kernel: str) -> str:
    """The class of a kernel, by its name."""
    lower = kernel.lower()
    return next((name for name, pattern in _CLASSES if re.search(pattern, lower)), "other")


@dataclass(frozen=True)
class Profile:
    """Milliseconds of kernels of one call, and the kernels that took most."""

    by_class: dict[str, float]
    longest: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(self.by_class.values())


def profile_step(step: Callable[[], object]) -> Profile:
    """Profile one call; kernels of the GPU, or operators where there is none."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize()
    times = [(event.key, _self_ms(event, cuda=cuda)) for event in recorded.key_averages()]
    return summarize(times)


def summarize(times: Iterable[tuple[str, float]]) -> Profile:
    """Sum milliseconds by class."""
    by_class = dict.fromkeys(NAMES, 0.0)
    known = [(name, value) for name, value in times if value > 0.0]
    for name, value in known:
        by_class[class_of(name)] += value
    longest = sorted(known, key=lambda item: -item[1])[:15]
    return Profile(by_class, tuple(longest))


def _self_ms(event: object, *, cuda: bool) -> float:
    return float(getattr(event, "self_device_time_total" if cuda else "self_cpu_time_total")) / 1e3
