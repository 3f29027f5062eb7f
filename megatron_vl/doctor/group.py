"""Let the ranks of a run meet, tell each other their facts, and measure what goes between them.

Facts and results go over gloo, which needs no device. What is measured goes over a group of its own, on the backend
that a training would use, and in a thread: NCCL waits in its own code for a rank that does not come, where nothing but
the end of the process ends it. So every rank gives up after a while, tells the others over gloo, and ends with a
message. A rank that dies ends the exchange of the others with an error of gloo.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vl.doctor.facts import Clock, Facts, Group, Link, Rates
from megatron_vl.doctor.machine import wait_for_listener
from megatron_vl.doctor.waiting import still_waits, within
from megatron_vl.errors import ConfigError, MegatronVLError
from megatron_vl.launch import Launch
from megatron_vl.parallel.agreement import by_all
from megatron_vl.parallel.process_group import start_process_group

BYTES = {"gloo": 8 * 2**20, "nccl": 128 * 2**20}
REPEATS = 5
"""Of each measurement, after one that is not counted."""


def examine_group(own: Facts, timeout_s: float) -> Group:
    """Return what all ranks have found. Every rank calls it, and gets the same result if all goes well.

    Args:
        timeout_s: how long to wait for a rank.

    Raises:
        ConfigError: on ranks other than 0, if the ranks cannot meet. Rank 0 tells of it in its findings.
    """
    try:
        _await_rank_0(own.launch, timeout_s)
        start_process_group("gloo", own.launch, init_method=None, timeout=timedelta(seconds=timeout_s))
    except (ConfigError, RuntimeError) as error:
        if own.launch.rank > 0:
            raise ConfigError(_line(error)) from error
        return Group((own,), error=_line(error))
    group = Group((own,))
    try:
        for step in (_gather_facts, _compare_clocks, _measure):
            group = step(group, timeout_s)
    except (RuntimeError, MegatronVLError) as error:
        return replace(group, error=_line(error))
    return group


def _await_rank_0(launch: Launch, timeout_s: float) -> None:
    """Wait for the store of rank 0, or of torchrun. torch itself would wait several times as long, and write a lot.

    Raises:
        ConfigError: if there is none.
    """
    if launch.rank == 0 or launch.missing:
        return
    if reason := wait_for_listener(launch.meeting_place, timeout_s):
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} finds nobody at {launch.meeting_place} (MASTER_ADDR, "
            f"MASTER_PORT) after {timeout_s:.0f} s ({reason}): see whether rank 0 has ended, and whether a firewall is "
            "between the machines"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _gather_facts(group: Group, timeout_s: float) -> Group:
    del timeout_s
    own = group.ranks[0]
    return replace(group, ranks=tuple(by_all(lambda: own)))


def common_backend(ranks: Sequence[Facts]) -> str:
    """Return NCCL if each rank has a device of its own, else gloo."""
    return "nccl" if all(_has_own_device(facts) for facts in ranks) else "gloo"


def _has_own_device(facts: Facts) -> bool:
    try:
        return (
            bool(facts.torch.devices and facts.torch.nccl) and facts.launch.device_index(len(facts.torch.devices)) >= 0
        )
    except ConfigError:
        return False


def _compare_clocks(group: Group, timeout_s: float) -> Group:
    """Let each rank answer rank 0 with its time; the shortest round trip bounds the error best."""
    del timeout_s
    rank, clocks = dist.get_rank(), []
    for peer in range(1, dist.get_world_size()):
        if rank == 0:
            clocks.append(min((_ask(peer) for _ in range(REPEATS)), key=lambda clock: clock.bound))
        elif rank == peer:
            for _ in range(REPEATS):
                _answer()
    return replace(group, clocks=tuple(clocks))


def _ask(peer: int) -> Clock:
    told = torch.zeros(1, dtype=torch.float64)
    began, start = time.time(), time.monotonic()
    dist.send(told, peer)
    dist.recv(told, peer)
    return compared(peer, began, time.monotonic() - start, float(told.item()))


def compared(rank: int, began: float, took: float, told: float) -> Clock:
    """Return the clock of a rank that told its time within a round trip, which began at a time and took so long."""
    return Clock(rank, told - (began + took / 2), took / 2)


def _answer() -> None:
    question = torch.zeros(1, dtype=torch.float64)
    dist.recv(question, 0)
    dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)


def _measure(group: Group, timeout_s: float) -> Group:
    """Measure on every rank, and gather the rates. A rank that waits in vain gives up before the others' gathering."""
    backend = common_backend(group.ranks)
    launch = group.ranks[dist.get_rank()].launch
    index = launch.device_index(torch.cuda.device_count()) if backend == "nccl" else None
    try:
        rates = within(timeout_s / 2, lambda: _rates(backend, index, timeout_s))
    except TimeoutError:
        rates = Rates(error=f"rank {dist.get_rank()} waited {timeout_s / 2:.0f} s for the others")
    except (RuntimeError, OSError) as error:
        rates = Rates(error=_line(error))
    group = replace(group, backend=backend, bytes=BYTES[backend])
    return replace(group, rates=tuple(by_all(lambda: rates)))


def _rates(backend: str, device_index: int | None, timeout_s: float) -> Rates:
    device = torch.device("cpu")
    if device_index is not None:
        torch.cuda.set_device(device_index)  # of this thread
        device = torch.device("cuda", device_index)
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s))
    size, rank = dist.get_world_size(), dist.get_rank()
    tensor = torch.zeros(BYTES[backend] // 4, dtype=torch.float32, device=device)
    all_reduce = _median_time(lambda: dist.all_reduce(tensor, group=group), device)
    links = []
    for turn in turns(size):
        dist.all_reduce(tensor[:1], group=group)  # the next turn begins when all are ready
        for pair in turn:
            if rank in pair:
                took = _median_time(lambda pair=pair: _there_and_back(tensor, pair, group), device)  # type: ignore[misc]
                links.append(Link(pair, 2 * BYTES[backend] / took))
    own = tuple(link for link in links if link.ranks[0] == rank)
    return Rates(2 * (size - 1) / size * BYTES[backend] / all_reduce, own)


def turns(size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the pairs of neighbors of a ring, in turns in which each rank has one pair at most."""
    pairs = [(rank, rank + 1) for rank in range(size - 1)]
    yield pairs[0::2]
    if size > 2:
        yield pairs[1::2]
        yield [(size - 1, 0)]


def _there_and_back(tensor: torch.Tensor, pair: tuple[int, int], group: dist.ProcessGroup | None) -> None:
    first, second = pair
    for source, target in ((first, second), (second, first)):
        if dist.get_rank() == source:
            dist.send(tensor, target, group=group)
        else:
            dist.recv(tensor, source, group=group)


def _median_time(action: Callable[[], object], device: torch.device) -> float:
    """Return the median number of seconds that an action takes, to its end on the device."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def leave() -> None:
    """Wait until all ranks have come here, so that no rank's status ends another one that still writes."""
    dist.barrier()
    if not still_waits():
        dist.destroy_process_group()
