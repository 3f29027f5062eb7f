"""A topology takes down what it started."""

from __future__ import annotations

import subprocess
import sys

_RUN = """
from pathlib import Path
import torch
import torch.distributed as dist
from megatron_vl.backends.platform import prepare_process
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.parallel.topology import Topology

def gloo_threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())

prepare_process()
counts = []
for _ in range(2):  # the second start makes groups of its own
    with Topology(ParallelConfig()) as topology:
        dist.all_reduce(torch.ones(1))
        counts.append(topology.world_size)
    counts.append(gloo_threads())
print(counts)
"""


def test_no_thread_of_a_group_outlives_the_topology() -> None:
    """One that does may abort the process while the interpreter ends, after all the work was done."""
    done = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[1, 0, 1, 0]", done.stderr
