"""The benchmarks of data and planning run in their small form, and meet the goals that no machine decides."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["packing", "balance"])
def test_smoke(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "next-fit fills 86.8 %" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(set(row) == {"name", "ours", "reference", "ratio", "goal", "met"} for row in rows)
    exact = [row for row in rows if row["goal"] is not None and not row["name"].startswith("seconds")]
    assert len(exact) >= 2
    assert all(row["met"] and row["ratio"] <= row["goal"] for row in exact), exact


def test_planning_in_blocks(tmp_path: Path) -> None:
    """What few samples add is noise of the interpreter, so of the goals only the peaks count."""
    command = [sys.executable, "benchmarks/planning.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "60,000 samples in blocks of at most 8,192: 8 blocks" in done.stdout
    assert "40,000 samples in blocks of at most 40,000: 1 blocks" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 5 and all(row["ours"] > 0 for row in rows)
    assert all(row["met"] for row in rows[:2]), rows


def test_stages_that_sleep_run_the_schedule(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/placement.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 4 and all(row["ours"] > 0.0 and row["reference"] > 0.0 for row in rows)


def test_the_simulator_beside_stages_that_sleep(tmp_path: Path) -> None:
    """The simulator knows the order and the waits: a makespan below the simulated one would show that it does not."""
    command = [sys.executable, "benchmarks/schedule.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"].rsplit(", ", 1)[0] for row in rows] == [
        f"{what}, pipeline 2, virtual {virtual}"
        for virtual in (1, 2)
        for _ in ("4 images", "stream")
        for what in ("makespan", "begin of a pass")
    ]
    assert all(row["ratio"] > 0.999 for row in rows if row["name"].startswith("makespan")), rows


@pytest.mark.parametrize(
    ("flags", "count"),
    [("--smoke", 24 + 4 + 3), pytest.param("--parts operations", 24, marks=pytest.mark.long)],
    ids=["four layers of each kind, one layout", "operations of the whole model"],
)
def test_the_plan_is_what_the_program_does(tmp_path: Path, flags: str, count: int) -> None:
    """What each layer computes is the same at any depth."""
    command = [sys.executable, "benchmarks/audit.py", *flags.split(), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == count
    assert all(row["met"] and row["reference"] > 0 for row in rows if "data parallelism" not in row["name"]), rows


def test_frozen_parts_compute_no_product_too_many(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/frozen.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 4 and all(row["ours"] > 0 for row in rows[:2])
    assert [row["ours"] for row in rows[2:]] == [0, 0] and all(row["met"] for row in rows[2:])


def test_peaks_of_real_ranks_are_those_of_the_plan(tmp_path: Path) -> None:
    """Bytes do not depend on the machine, so the goal holds here too, for the tiny model."""
    command = [sys.executable, "benchmarks/planned_memory.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    peaks = [row for row in rows if row["goal"] is not None]
    assert len(peaks) == 4 and len(rows) == 12 and all(row["met"] for row in peaks), rows


def test_live_bytes_count_storages_while_something_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with importlib.import_module("live_bytes").LiveBytes() as live:
        first = torch.zeros(1000)
        rows = first.view(10, 100)
        second = first + 1
        assert (live.now(), live.peak) == (8000, 8000)
        del first
        assert live.now() == 8000, "a view holds the storage"
        del rows
        third = second.new_zeros(500)
        assert (live.now(), live.peak) == (6000, 8000)
        del second, third
        assert (live.restart(), live.peak) == (0, 0)
        weight = torch.ones(250, requires_grad=True)
        (weight * weight).sum().backward()
        assert live.now() == 2000, "a weight and its gradient"
        assert live.peak >= 3000, "a gradient by each of the two factors, before they are added"


def test_planned_steps_beside_real_ones(tmp_path: Path) -> None:
    """It runs; how right the times are, only a quiet machine tells."""
    command = [sys.executable, "benchmarks/planned_step.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *steps, order = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in steps] == ["step, tensor 2", "step, pipeline 2, virtual 2"]
    assert all(row["ours"] > 0 and row["reference"] > 0 for row in steps)
    assert order["reference"] == 1 and order["goal"] == 0


def test_links_and_orders_of_planned_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    planned_step = importlib.import_module("planned_step")
    link = planned_step.link_of([(1_000_000, 3e-3), (17_000_000, 19e-3)], 2)
    assert (link.bandwidth, link.latency) == (pytest.approx(1e9), pytest.approx(1e-3))
    planned = {"a": 1.0, "b": 1.01, "c": 2.0}
    assert planned_step.wrong_pairs(planned, {"a": 1.04, "b": 1.0, "c": 3.0}) == [], "a and b are too close"
    assert planned_step.wrong_pairs(planned, {"a": 1.06, "b": 1.0, "c": 1.02}) == [("a", "b")]
    assert planned_step.wrong_pairs(planned, {"a": 4.0, "b": 1.0, "c": 2.0}) == [("a", "b"), ("a", "c")]


def test_every_place_of_the_tower_has_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    placement = importlib.import_module("placement")
    equal, first, auto, kept, twice = placement.make_cases([7, 4, 2, 1], 4)

    def work(case: Any) -> float:
        return sum(map(sum, [*case.forward, *case.backward, case.before, case.after]))

    # Stage time for four stages and four micro-batches; with images in every one, nothing encodes a blank image.
    assert work(equal) == pytest.approx(16 * placement.STAGE_SECONDS)
    assert [work(case) for case in (first, auto, kept)] == pytest.approx([work(equal)] * 3)
    assert kept.before == pytest.approx([kept.before[0] * share for share in (1.0, 4 / 3, 1.0, 4 / 3)])  # 3, 4, 3, 4
    assert work(twice) - work(kept) == pytest.approx(sum(kept.before))


def test_the_reference_is_first_fit_decreasing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stream = importlib.import_module("stream")
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 300, 40).tolist():
        lengths = rng.integers(1, stream.ROW + 1, size)
        used: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            row = next((row for row, tokens in enumerate(used) if tokens + length <= stream.ROW), None)
            if row is None:
                used.append(length)
            else:
                used[row] += length
        assert stream.first_fit_decreasing(lengths) == len(used)
