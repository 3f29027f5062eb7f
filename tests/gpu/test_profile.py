"""A profile on a device: kernels in the trace, its memory, and times of events on the stream."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.helpers.prepared import prepare_tiny
from tests.helpers.ranks import RankPools
from tests.unit.training.test_profiling import events_of, profiled, ranges, train_noting, written


@pytest.mark.gpu
def test_a_profile_of_a_device_has_its_kernels_and_its_memory(ranks: RankPools, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    config = profiled(prepare_tiny(tmp_path / "data"), folder, record_memory_history=True)
    ranks(1).run(train_noting, config)
    trace = folder / "rank0_steps2-3.pt.trace.json.gz"
    assert events_of(trace, "kernel") and ranges(trace)["backward stage 0 micro-batch 0"] == 2
    with (folder / "rank0_steps2-3.memory.pickle").open("rb") as file:
        snapshot = pickle.load(file)  # noqa: S301 - this test has written it
    assert snapshot["segments"] and any(snapshot["device_traces"])
    profile = written(folder)
    assert profile.device != "CPU"
    assert all(seconds > 0 for row in profile.micro_batches for seconds in (*row.forward, *row.backward))
