"""No layer asks the device for a number: on a GPU the CPU would wait for everything that it has been given to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, micro_batches, tiny_config

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.lift_fresh", "aten.masked_select")
"""What reads a value, what has a shape that depends on one, and what copies a number from the CPU."""


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rpartition(".")[0]
        is_number = name == "aten.lift_fresh" and args[0].dim() == 0  # travels as an argument of a kernel
        if name in WAITS and not is_number:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def _waits(function: Callable[[], Any]) -> list[str]:
    with _Waits() as waits:
        function()
    return waits.seen


def _look(start: Start, config: RunConfig) -> dict[str, list[str]]:
    """What each part of a micro-batch waits for; the first pass fills what is kept."""
    with start.topology(config.parallel) as topology:
        (chunk,) = build_model(config, topology)
        batch = micro_batches(MODEL, 2)[1]
        language, vision = chunk.language_model, chunk.vision
        chunk(batch)
        inputs = language.attention_inputs(PackedLine(batch.span_lengths, batch.cu_seqlens, batch.positions))
        hidden = torch.randn(len(batch.tokens), 1, MODEL.language.hidden_size, requires_grad=True)
        head = {"positions": batch.supervised, "targets": batch.targets}
        return {
            "vision": _waits(lambda: vision(batch.pixels).sum().backward()),
            "resampler": _waits(lambda: chunk.resampler(vision(batch.pixels)).sum().backward()),
            "language": _waits(lambda: language(hidden, inputs).sum().backward()),
            "head": _waits(lambda: language.token_losses(hidden, **head).sum().backward()),
        }


@pytest.mark.parametrize("recompute", [None, "full"])
def test_nothing_waits_for_the_device(ranks: RankPools, recompute: str | None) -> None:
    """Selective recomputation passes the kind of its mask on as a tensor, but one that stays on the CPU."""
    config = tiny_config(training={"recompute_granularity": recompute})
    waits = ranks(1).run(_look, config)[0]
    assert {name: sorted(set(seen)) for name, seen in waits.items()} == dict.fromkeys(waits, [])
