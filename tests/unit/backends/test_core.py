"""What is replaced in Megatron-Core on every device: the optimizer and the checkpoint writer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vl.backends import core, kernels
from megatron_vl.backends.core import WRITERS, GroupStepAdamW
from megatron_vl.backends.versions import MEGATRON_CORE, installed_core
from tests.unit.backends.patches import recorded

NAMES = WRITERS[installed_core()]
"""What the writer's parts are called in the version that is here."""
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.05}


def _replaced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``install`` would replace, by the name of its place; the readers of metadata have a test of their own."""
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(core.safe_metadata, "install", lambda: None)
    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):  # it comes with Apex alone
        monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    return recorded(core, core.install)


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(7, 5), (5,), (3, 2, 2)]]


def _groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1, "weight_decay": 0.0}]


def _step(optimizer: torch.optim.Optimizer, parameters: list[Tensor], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if number == 2 and index == 1:
            parameter.grad = None
    optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
    optimizer.step()


def test_adamw_equals_torch() -> None:
    """Ten steps, two groups, a learning rate that changes."""
    ours, theirs = _parameters(), _parameters()
    mine, reference = GroupStepAdamW(_groups(ours), **SETTINGS), torch.optim.AdamW(_groups(theirs), **SETTINGS)
    for number in range(10):
        for optimizer, parameters in ((mine, ours), (reference, theirs)):
            generator = torch.Generator().manual_seed(number)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
            optimizer.step()
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[found][name], reference.state[expected][name], rtol=1e-6, atol=1e-8)


def _moments(number: int, shapes: list[tuple[int, ...]]) -> core.Moments:
    generator = torch.Generator().manual_seed(number)
    columns = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    return *columns, [torch.rand(shape, generator=generator) for shape in shapes]


def _adamw_in_steps(tensors: core.Moments, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for parameter, gradient, mean, square in zip(*tensors, strict=True):
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        denominator = square.sqrt().div_((1.0 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1.0 - beta1 ** group["step"]))


@pytest.mark.parametrize("number", [1, 2, 50])
def test_the_update_is_the_one_in_steps(number: int) -> None:
    """To the rounding of fp32."""
    group = {**SETTINGS, "step": number}
    before = _moments(number, [(33, 7), (5,), (16,)])
    both = []
    for update in (core.adamw, _adamw_in_steps):
        tensors = tuple([tensor.clone() for tensor in tensors] for tensors in before)
        update(tensors, group)
        both.append(tensors)
    for found, expected, old in zip(both[0], both[1], before, strict=True):
        for one, other, start in zip(found, expected, old, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
            assert torch.equal(one, start) == (old is before[1]), "all but the gradients change"


@pytest.mark.parametrize(("begin", "end"), [(0, 4099), (1, 4099), (3, 17), (5, 6), (100, 1123), (4080, 4099)])
def test_a_share_of_a_parameter_is_updated_as_the_whole(begin: int, end: int) -> None:
    """Bit for bit, wherever the distributed optimizer cuts it."""
    group = {**SETTINGS, "step": 5}
    whole = _moments(0, [(4099,)])
    share = tuple([tensor[begin:end].clone() for tensor in column] for column in whole)
    core.adamw(whole, group)
    core.adamw(share, group)
    for found, expected in zip(share, whole, strict=True):
        assert torch.equal(found[0], expected[0][begin:end])


def test_norm_and_scale_are_megatron_core_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither Apex nor Transformer Engine brings them; they ask the device for nothing on the way."""
    from megatron.core.optimizer import clip_grads

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in [(40, 30), (7,), (2, 3, 4)]]
    monkeypatch.setattr(clip_grads, "l2_norm_impl", clip_grads.local_multi_tensor_l2_norm)
    norms = {
        "megatron.core.optimizer.clip_grads.l2_norm_impl": core.l2_norm,
        "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl": core.scale,
    }
    assert norms.items() <= _replaced(monkeypatch).items()
    none = torch.zeros(1, dtype=torch.int)
    norm, _ = clip_grads.multi_tensor_applier(core.l2_norm, none, [gradients], False)
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat([gradient.flatten() for gradient in gradients]).norm())
    expected = [gradient * 0.25 for gradient in gradients]
    clip_grads.multi_tensor_applier(core.scale, none, [gradients, gradients], 0.25)
    assert all(torch.equal(found, wanted) for found, wanted in zip(gradients, expected, strict=True))
    monkeypatch.setattr(clip_grads, "l2_norm_impl", object())
    assert not norms.keys() & _replaced(monkeypatch).keys(), "a fused one stays"


@pytest.mark.parametrize(("cuda", "apex"), [(True, False), (True, True), (False, False)])
def test_linear_layers_add_their_gradients_by_our_kernel_where_apex_is_not(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, apex: bool
) -> None:
    """Megatron-Core's output layer ends at once where it is to use Apex's and there is none."""
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
    place = "megatron.core.tensor_parallel.layers"
    found = {name: value for name, value in _replaced(monkeypatch).items() if name.startswith(place)}
    if cuda and not apex:
        assert found.pop(f"{place}._grad_accum_fusion_available") is True
        ours = found.pop(f"{place}.fused_weight_gradient_mlp_cuda")
        assert ours.wgrad_gemm_accum_fp32 is kernels.add_weight_gradient
    assert found == {}


def test_a_parameter_without_gradient_stays() -> None:
    parameters = _parameters()
    optimizer = GroupStepAdamW(parameters, **SETTINGS)
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])
    assert torch.equal(parameters[1], before[1]) and parameters[1] not in optimizer.state


def test_groups_count_steps_also_when_they_are_empty() -> None:
    parameter = _parameters()[0]
    optimizer = GroupStepAdamW([{"params": [parameter]}, {"params": []}], **SETTINGS)
    parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}, "the state of a fused optimizer"


def test_state_goes_on_after_a_round_trip() -> None:
    runs = []
    for saved_after in (None, 2):
        parameters = _parameters()
        optimizer = GroupStepAdamW(_groups(parameters), **SETTINGS)
        for number in range(4):
            _step(optimizer, parameters, number)
            if number == saved_after:
                state = optimizer.state_dict()
                optimizer = GroupStepAdamW(_groups(parameters), **SETTINGS)
                optimizer.load_state_dict(state)
        runs.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.fixture(scope="module")
def replaced() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        return _replaced(patch)


def test_only_places_that_exist_are_replaced(replaced: dict[str, Any]) -> None:
    """``recorded`` asserts it for each of them."""
    filesystem = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    assert replaced.keys() == {
        "megatron.core.optimizer.Adam",
        "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",
        "megatron.core.optimizer.distrib_optimizer.Adam",
        "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        "megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
        "megatron.core.optimizer.clip_grads.l2_norm_impl",
        "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
        "megatron.core.transformer.mlp.bias_gelu_impl",
        "megatron.core.transformer.mlp.bias_swiglu_impl",
        f"{filesystem}.{NAMES.queue}",
        f"FileSystemWriterAsync.{NAMES.write}",
    }


def test_the_writer_of_every_supported_version_is_known() -> None:
    """What differs between them is here; nothing else asks for the version of what it replaces."""
    assert WRITERS.keys() == MEGATRON_CORE.keys()


def test_the_gelu_of_the_vision_tower_is_exact(replaced: dict[str, Any]) -> None:
    from megatron.core.transformer import mlp

    generator = torch.Generator().manual_seed(0)
    hidden, bias = torch.randn(9, 2, 16, generator=generator), torch.randn(16, generator=generator)
    gelu = replaced["megatron.core.transformer.mlp.bias_gelu_impl"]
    assert gelu is kernels.bias_gelu
    assert torch.equal(gelu(hidden, bias), torch.nn.functional.gelu(hidden + bias))
    assert (mlp.bias_gelu_impl(hidden, bias) - gelu(hidden, bias)).abs().max() > 1e-4, "theirs is not"


def test_the_writer_takes_what_megatron_core_gives(replaced: dict[str, Any]) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = inspect.signature(getattr(FileSystemWriterAsync, NAMES.write))
    ours = inspect.signature(replaced[f"FileSystemWriterAsync.{NAMES.write}"].__func__)
    assert len(ours.parameters) == len(original.parameters)
    assert list(original.parameters) == [
        "transform_list", "use_msc", "rank", "write_buckets", "global_results_queue"
    ]  # fmt: skip
    inner = list(inspect.signature(FileSystemWriterAsync.write_preloaded_data).parameters)
    assert inner[:6] == [
        "transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync"
    ]  # fmt: skip


def test_the_optimizer_takes_what_megatron_core_gives() -> None:
    """The arguments of get_megatron_optimizer's Adam: see _get_megatron_optimizer_based_on_param_groups."""
    given = {"params": _parameters(), "lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = GroupStepAdamW(**given, adam_w_mode=True)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    with pytest.raises(AssertionError, match="decoupled"):
        GroupStepAdamW(**given, adam_w_mode=False)


def test_the_writer_hands_on_a_failure(replaced: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one bucket is the result, so that the save ends with it; later buckets are not written."""
    import queue

    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written = []

    def fail(_transforms: Any, number: int, bucket: Any, results: Any, _count: Any, _sync: bool) -> None:
        written.append(bucket)
        results.put((number, OSError("no space left") if bucket == "bad" else [bucket]))

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(fail))
    write = replaced[f"FileSystemWriterAsync.{NAMES.write}"].__func__
    results: queue.Queue[Any] = queue.Queue()
    write([], False, 0, ["good", "bad", "never"], results)
    assert isinstance(results.get(), OSError) and written == ["good", "bad"]
    write([], False, 0, ["good", "fine"], results)
    assert results.get() == {0: ["good"], 1: ["fine"]}
