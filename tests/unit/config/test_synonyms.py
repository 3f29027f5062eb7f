"""Megatron-LM's levers: each is a flag here, or is refused with a reason and with what to do."""

from __future__ import annotations

import pytest

from megatron_vl.config.fields import iterate_fields
from megatron_vl.config.load import load_config
from megatron_vl.errors import ConfigError

SAID = {
    "--context-parallel-size": ("no context parallelism", "--sequence-parallel"),
    "--cp-comm-type": ("no context parallelism", "--sequence-parallel"),
    "--tp-comm-overlap": ("user buffers", "tools/plan.py"),
    "--tp-comm-bulk-wgrad": ("user buffers", "tools/plan.py"),
    "--use-precision-aware-optimizer": ("are fp32", "--use-distributed-optimizer"),
    "--main-grads-dtype": ("are fp32", "--use-distributed-optimizer"),
    "--main-params-dtype": ("are fp32", "--use-distributed-optimizer"),
    "--exp-avg-dtype": ("are fp32", "--use-distributed-optimizer"),
    "--exp-avg-sq-dtype": ("are fp32", "--use-distributed-optimizer"),
    "--accumulate-allreduce-grads-in-fp32": ("always summed and reduced in fp32", "leave this out"),
    "--recompute-method": ("the method uniform and one layer", "leave this out"),
    "--recompute-num-layers": ("the method uniform and one layer", "leave this out"),
    "--recompute-modules": ("core_attn", "--recompute-granularity full"),
    "--num-layers-per-virtual-pipeline-stage": ("model chunks", "--num-virtual-stages-per-pipeline-rank"),
    "--overlap-p2p-communication": ("where there are virtual stages",),
    "--no-overlap-p2p-communication": ("where there are virtual stages",),
    "--memory-snapshot-path": ("--profile-dir",),
    "--transformer-impl": ("--backend",),
}


@pytest.mark.parametrize("flag", SAID)
def test_a_lever_that_is_not_there_is_refused_with_the_reason(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [flag, "1"])
    assert all(part in str(caught.value) for part in (f"{flag} is not a known flag", *SAID[flag])), caught.value


def test_the_levers_that_are_there_have_megatron_s_names() -> None:
    flags = {spec.flag for spec in iterate_fields()}
    assert {
        "--overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer", "--recompute-granularity",
        "--sequence-parallel", "--profile", "--profile-step-start", "--profile-step-end", "--profile-ranks",
        "--use-pytorch-profiler", "--record-memory-history",
    } <= flags  # fmt: skip
