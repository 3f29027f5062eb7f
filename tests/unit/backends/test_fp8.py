"""FP8 contexts, and what a device must have, without Transformer Engine: Megatron-Core's functions are stand-ins."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.backends import fp8, te
from megatron_vl.backends.attention_inputs import AttentionInputs
from megatron_vl.config.schema import TrainingConfig
from megatron_vl.errors import ConfigError
from megatron_vl.model import context
from megatron_vl.model.context import LayerExecution, run_layers

GROUP: Any = object()


def test_the_names_are_megatron_cores() -> None:
    """Custom, which needs a function of the user's own, is left out."""
    recipes = get_args(get_type_hints(TrainingConfig)["fp8_recipe"])
    assert set(recipes) == {recipe.value for recipe in Fp8Recipe} - {"custom"}
    told = get_type_hints(TransformerConfig)
    assert set(recipes) < set(get_args(get_args(told["fp8_recipe"])[0]))
    assert set(_choices(get_type_hints(TrainingConfig)["fp8_format"])) == set(_choices(told["fp8"]))


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(name for part in get_args(hint) for name in get_args(part))


class _Layer(nn.Module):
    """Notes the context in which it runs, and doubles."""

    def __init__(self, active: list[int | None], seen: list[list[int | None]]) -> None:
        super().__init__()
        self.active, self.seen = active, seen

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        self.seen.append(list(self.active))
        return hidden * 2.0, None


class _Watch:
    """Two layers, 7 and 8 of a tower, and what was entered around them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active: list[int | None] = []
        """The contexts that are open: the number of a layer, or None for all."""
        self.seen: list[list[int | None]] = []
        """Those of each pass of a layer."""
        self.checkpoints: list[tuple[Any, ...]] = []
        """What Transformer Engine's checkpoint function is given beside the function and the tensor."""
        monkeypatch.setattr(fp8.fp8_utils, "get_fp8_context", self._context)
        extension = SimpleNamespace(te_checkpoint=self._checkpoint)
        monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", extension)
        self.plain: list[tuple[Any, ...]] = []
        """The same of Megatron-Core's own function."""
        monkeypatch.setattr(context.tensor_parallel, "checkpoint", self._plain_checkpoint)
        self.layers = nn.ModuleDict({number: _Layer(self.active, self.seen) for number in ("7", "8")})

    @contextlib.contextmanager
    def _context(self, config: TransformerConfig, layer_no: int | None = None) -> Iterator[None]:
        self.active.append(layer_no)
        yield
        self.active.pop()

    def _checkpoint(self, run: Any, *args: Any) -> Tensor:
        self.checkpoints.append(args[:-1])
        output: Tensor = torch.utils.checkpoint.checkpoint(run, args[-1], use_reentrant=True)
        return output

    def _plain_checkpoint(self, run: Any, *args: Any) -> Tensor:
        self.plain.append(args[:-1])
        output: Tensor = torch.utils.checkpoint.checkpoint(run, args[-1], use_reentrant=True)
        return output

    def run(self, recipe: str | None, *, recompute: bool = False) -> Tensor:
        config = TransformerConfig(
            num_layers=10, hidden_size=4, num_attention_heads=1, fp8=recipe and "hybrid", fp8_recipe=recipe
        )
        hidden = torch.ones(2, 1, 4, requires_grad=True)
        execution = LayerExecution(config, GROUP, recompute)
        output = run_layers(self.layers, hidden, inputs=AttentionInputs(), execution=execution)
        if output.requires_grad:
            output.sum().backward()
            assert torch.equal(hidden.grad, torch.full_like(hidden, 4.0))
        return output


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> _Watch:
    return _Watch(monkeypatch)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_each_layer_has_a_context_with_its_number_in_the_tower(watch: _Watch, recipe: str) -> None:
    watch.run(recipe)
    assert watch.seen == [[7], [8]] and not watch.active


def test_delayed_scaling_has_one_context_around_all_layers(watch: _Watch) -> None:
    watch.run("delayed")
    assert watch.seen == [[None], [None]] and not watch.active


@pytest.mark.parametrize("recompute", [False, True])
def test_without_fp8_there_is_no_context(watch: _Watch, recompute: bool) -> None:
    watch.run(None, recompute=recompute)
    assert watch.seen == [[]] * (4 if recompute else 2) and not watch.checkpoints
    assert watch.plain == [(False,)] * (2 if recompute else 0)


def test_evaluation_is_in_bf16(watch: _Watch) -> None:
    watch.layers.eval()
    for recipe in ("tensorwise", "delayed"):
        watch.run(recipe, recompute=True)
    assert watch.seen == [[]] * 4 and not watch.checkpoints


def test_layers_are_computed_again_by_transformer_engine_in_their_contexts(watch: _Watch) -> None:
    watch.run("tensorwise", recompute=True)
    assert watch.seen == [[7], [8], [8], [7]], "forward, and again on the way back"
    expected = (False, te.get_cuda_rng_tracker, GROUP)
    assert watch.checkpoints == [expected, expected] and not watch.plain


def test_what_keeps_no_graph_is_not_computed_again(watch: _Watch) -> None:
    with torch.no_grad():
        watch.run("tensorwise", recompute=True)
    assert watch.seen == [[7], [8]] and not watch.checkpoints


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "refused"),
    [
        ("tensorwise", (8, 0), "13.0", "has compute capability 8.0, and FP8 needs 8.9 or newer"),
        ("tensorwise", (8, 9), "12.4", ""),
        ("delayed", (9, 0), "12.4", ""),
        ("blockwise", (9, 0), "12.8", r"CUDA 12.8, and blockwise scaling needs 9.0 or newer and CUDA 12.9 or newer"),
        ("blockwise", (9, 0), "12.9", ""),
        ("blockwise", (9, 0), "13.0", ""),
        ("blockwise", (8, 9), "13.0", "blockwise scaling needs 9.0 or newer"),
        ("blockwise", (9, 0), None, "CUDA of no version"),
        ("mxfp8", (9, 0), "13.0", "has compute capability 9.0, and MXFP8 needs one from 10.0 and below 12.0"),
        ("mxfp8", (10, 0), "13.0", ""),
        ("mxfp8", (10, 3), "13.0", ""),
        ("mxfp8", (12, 0), "13.0", "12.0, and MXFP8 needs one from 10.0 and below 12.0"),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, recipe: str, capability: tuple[int, int], cuda: str | None, refused: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    told = f"training.fp8_recipe {recipe}: a GPU .*{refused}.*--fp8-"
    with pytest.raises(ConfigError, match=told) if refused else contextlib.nullcontext():
        fp8.check_device(recipe)
