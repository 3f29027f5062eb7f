"""Replace parts of Megatron-Core, on every device.

Each part is replaced because the original would break a promise of this project:

* the optimizer, where neither Apex nor Transformer Engine provides a fused one. torch's AdamW keeps a ``step`` for each
  parameter, which a distributed checkpoint of another layout cannot restore. :class:`GroupStepAdamW` keeps one for each
  parameter group, as the fused ones do;
* the norm and the scaling of gradients, where neither provides them. The original waits for a CUDA device once for
  each parameter, and scales in two passes over memory;
* the kernel by which linear layers add weight gradients to their fp32 sum, which Megatron-Core takes from Apex alone.
  Without it each micro-batch passes over all gradients once more;
* the fused bias and GELU of an MLP. The original uses the tanh approximation; Qwen-VL's GELU is exact;
* the fused SwiGLU of an MLP on a CPU. The original would be compiled, which needs a compiler on every machine;
* the checkpoint writer. That of 0.16.1 starts processes, and if one is killed, the save waits forever. That of 0.19.2
  loses the reason of a failure, such as a full disk. Ours writes in the rank's own thread and hands the reason on;
* the results queue of that writer, which would start a manager process;
* the readers of checkpoint metadata, which would run code from a hostile file (``safe_metadata.py``).

``tests/unit/backends/test_core.py`` fails when a new version of Megatron-Core moves what is replaced. The versions that
are supported differ in the names of the writer's parts (``WRITERS``); docs/megatron_core.md has the whole comparison.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.backends import elementwise, kernels, safe_metadata
from megatron_vl.backends.versions import installed_core


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with the state of NVIDIA's fused optimizers: ``exp_avg`` and ``exp_avg_sq``, and a step for each group.

    The step also counts in groups without parameters. A rank may hold nothing of a group, but a checkpoint stores the
    groups of rank 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        assert kwargs.get("adam_w_mode", True), "weight decay is decoupled"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": kwargs.get("weight_decay", 0.0)}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = [self._moment(parameter, "exp_avg") for parameter in parameters]
        squares = [self._moment(parameter, "exp_avg_sq") for parameter in parameters]
        adamw((parameters, gradients, means, squares), group)

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        moment: Tensor = state[name]
        return moment


Moments = Sequence[list[Tensor]]
"""Parameters, their gradients, and the means of these and of their squares."""


_TOGETHER = 16
"""Numbers that a CPU updates at a time, at most: the kernel computes what is left of a tensor with other roundings."""


def adamw(tensors: Moments, group: dict[str, Any]) -> None:
    """Update in a single pass over memory by torch's kernel.

    On a CPU the last numbers of a tensor go through the kernel in a tensor that is filled up with zeros. So an update
    does not depend on where a rank's share of a parameter begins and ends.
    """
    if tensors[0][0].is_cuda:
        _fused_adamw(tensors, group)
        return
    whole, rests = _split_tails(tensors)
    _fused_adamw(whole, group)
    if rests[0]:
        filled = [[F.pad(rest, (0, -len(rest) % _TOGETHER)) for rest in column] for column in rests]
        _fused_adamw(filled, group)
        for column, rest_column in zip(filled, rests, strict=True):
            for computed, rest in zip(column, rest_column, strict=True):
                rest.copy_(computed[: len(rest)])


def _split_tails(tensors: Moments) -> tuple[Moments, Moments]:
    """Return views of the multiples of ``_TOGETHER`` numbers of each tensor, and of the rests that are not empty."""
    flat = [[tensor.view(-1) for tensor in column] for column in tensors]
    cuts = [len(tensor) - len(tensor) % _TOGETHER for tensor in flat[0]]
    whole = [[tensor[:cut] for tensor, cut in zip(column, cuts, strict=True) if cut] for column in flat]
    rests = [[tensor[cut:] for tensor, cut in zip(column, cuts, strict=True) if cut < len(tensor)] for column in flat]
    return whole, rests


def _fused_adamw(tensors: Moments, group: dict[str, Any]) -> None:
    parameters, gradients, means, squares = tensors
    if not parameters:
        return
    step = torch.full((), float(group["step"]), device=parameters[0].device)
    torch._fused_adamw_(
        parameters,
        gradients,
        means,
        squares,
        [],
        [step] * len(parameters),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def install() -> None:
    """Replace the parts named above. Repeated calls change nothing."""
    _replace_optimizer()
    _replace_norms()
    _replace_weight_gradients()
    _replace_activations()
    _replace_writer()
    safe_metadata.install()


def _replace_optimizer() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    setattr(optimizer, "Adam", GroupStepAdamW)
    setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    setattr(distrib_optimizer, "Adam", GroupStepAdamW)
    # The form of a fused optimizer's state: a step in the group, two moments for each parameter.
    setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", True)


def l2_norm(_chunk: int, _overflow: Tensor, lists: list[list[Tensor]], _per_tensor: bool) -> tuple[Tensor, None]:
    """Return float32[1], the norm of all tensors of one list. Megatron-Core fixes the signature."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).view(1), None


def scale(_chunk: int, _overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Multiply the gradients in place. Megatron-Core fixes the signature, and passes them as source and as target."""
    sources, targets = lists
    assert all(source is target for source, target in zip(sources, targets, strict=True))
    torch._foreach_mul_(targets, factor)


def _replace_norms() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        setattr(clip_grads, "l2_norm_impl", l2_norm)
        setattr(clip_grads, "multi_tensor_scale_impl", scale)


def _replace_weight_gradients() -> None:
    from megatron.core.tensor_parallel import layers

    if torch.cuda.is_available() and not layers._grad_accum_fusion_available:
        setattr(layers, "_grad_accum_fusion_available", True)
        kernel = SimpleNamespace(wgrad_gemm_accum_fp32=kernels.add_weight_gradient)
        setattr(layers, "fused_weight_gradient_mlp_cuda", kernel)


def bias_swiglu(both: Tensor, bias: Tensor | None, *options: bool) -> Tensor:
    """Compute SwiGLU: [..., 2 f] -> [..., f]. Megatron-Core fixes the signature; the language model has no biases."""
    if both.is_cuda:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        return bias_swiglu_impl(both, bias, *options)
    assert bias is None
    return elementwise.SwiGLU.apply(both)


def _replace_activations() -> None:
    from megatron.core.transformer import mlp

    setattr(mlp, "bias_gelu_impl", kernels.bias_gelu)
    setattr(mlp, "bias_swiglu_impl", bias_swiglu)


def is_installed() -> bool:
    """Return whether :func:`install` has run in this process."""
    from megatron.core.transformer import mlp

    return bool(mlp.bias_gelu_impl is kernels.bias_gelu)


class _Unjoined:
    """A queue that nobody waits for."""

    def get(self) -> None:
        return None

    def task_done(self) -> None:
        return None


def _write_here(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Write this rank's part of a checkpoint in this process. Megatron-Core fixes the signature."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: dict[int, Any] | Exception = {}
    for number, bucket in enumerate(buckets):
        done: queue.Queue[Any] = queue.Queue()
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, done, _Unjoined(), True)
        outcome = done.get()[1]
        if isinstance(outcome, Exception):
            written = outcome
            break
        assert isinstance(written, dict)
        written[number] = outcome
    results.put(written)


@dataclass(frozen=True)
class WriterNames:
    """What the parts of the checkpoint writer that are replaced are called in ``filesystem_async``."""

    queue: str
    """The function that makes the results queue."""
    write: str
    """The method of ``FileSystemWriterAsync`` that writes a rank's part."""


WRITERS = {
    "0.16.1": WriterNames("_get_write_results_queue", "write_preloaded_data_multiproc"),
    "0.19.2": WriterNames("get_write_results_queue", "write_preloaded_data_multithread"),
}


def _replace_writer() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    names = WRITERS[installed_core()]
    results: queue.Queue[Any] = queue.Queue()
    setattr(filesystem_async, names.queue, lambda: results)
    setattr(filesystem_async.FileSystemWriterAsync, names.write, staticmethod(_write_here))
