"""What the ranks of a run are to each other: facts in, findings out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_vl.doctor.facts import Facts, Group, Link
from megatron_vl.doctor.findings import Finding, Row, join, missing, ok, wrong
from megatron_vl.doctor.judge_machine import OUT_OF_REACH, is_out_of_reach, judge_machine
from megatron_vl.doctor.judge_software import judge_software
from megatron_vl.doctor.packages import REQUIRED

_COMPARED = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", *REQUIRED)
_SLOW_LINK = 0.5
"""Of the median of all links between machines."""
_SKEW_S = 1.0


def judge(group: Group) -> list[Row]:
    """Return all findings: of every machine, and of all ranks together."""
    hosts = [facts.host for facts in group.ranks]
    rows = join([[*judge_software(facts), *judge_machine(facts)] for facts in group.ranks], hosts)
    together = tuple(dict.fromkeys(hosts))
    return rows + [Row(finding, together) for finding in judge_group(group)]


def judge_group(group: Group) -> list[Finding]:
    """Return what is found of several ranks; nothing of a single one."""
    world_size = group.ranks[0].launch.world_size
    if world_size == 1:
        return []
    findings = []
    if len(group.ranks) > 1:
        hosts = Counter(facts.host for facts in group.ranks)
        findings += [ok("ranks", f"{world_size} on {len(hosts)} {'machine' if len(hosts) == 1 else 'machines'}")]
        findings += [_same_versions(group.ranks), *_same_environment(group.ranks)]
    if group.clocks:
        findings.append(_clocks(group))
    if group.rates:
        findings += list(_rates(group))
    if group.error:
        findings.append(_not_met(group))
    return findings


def _not_met(group: Group) -> Finding:
    own = group.ranks[0]
    has_met = len(group.ranks) > 1
    advice = "see what the other ranks say, and whether a firewall is between the machines"
    if not has_met and is_out_of_reach(own):
        advice += f". {own.own_name.name} is {' '.join(own.own_name.addresses) or 'no address'} here: {OUT_OF_REACH}"
    found = f"a rank has ended, or is out of reach: {group.error}" if has_met else group.error
    return wrong("meeting", found, advice)


def differences(ranks: Sequence[Facts]) -> list[str]:
    """Return what is not the same on all ranks, each with its values and their machines."""
    values: dict[str, dict[str, dict[str, None]]] = {}
    for facts in ranks:
        for name, value in _versions(facts):
            values.setdefault(name, {}).setdefault(value, {})[facts.host] = None
    return [
        f"{name} {', '.join(f'{value} on {_named(list(hosts))}' for value, hosts in found.items())}"
        for name, found in values.items()
        if len(found) > 1
    ]


def _versions(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "Python", ".".join(map(str, facts.python))
    for name in _COMPARED:
        package = facts.package(name)
        state = "" if package.works or package.version is None else " (broken)"
        yield name, f"{'absent' if package.version is None else package.version}{state}"
    yield "CUDA of torch", facts.torch.cuda or "none"
    yield "NCCL", facts.torch.nccl or "none"
    yield "CUDA device", " and ".join(sorted({device.name for device in facts.torch.devices})) or "none"


def _named(hosts: Sequence[str]) -> str:
    return " ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _same_versions(ranks: Sequence[Facts]) -> Finding:
    if found := differences(ranks):
        return wrong("same versions", "; ".join(found), "install the same on all machines")
    return ok("same versions", "packages, NCCL and kinds of devices are the same on all ranks")


def _same_environment(ranks: Sequence[Facts]) -> list[Finding]:
    """Variables may differ on purpose, as names of network interfaces do. So this is only told."""
    names = sorted({name for facts in ranks for name in facts.environment if name != "CUDA_VISIBLE_DEVICES"})
    differing = [name for name in names if len({facts.environment.get(name) for facts in ranks}) > 1]
    return [ok("environment", f"differs between ranks: {' '.join(differing)}")] if differing else []


def _clocks(group: Group) -> Finding:
    farthest = max(group.clocks, key=lambda clock: abs(clock.ahead))
    host = group.ranks[farthest.rank].host
    side = "ahead of" if farthest.ahead >= 0 else "behind"
    told = (
        f"at most {abs(farthest.ahead):.4f} s apart, to {farthest.bound:.4f} s (rank {farthest.rank}, {host}, "
        f"{side} rank 0)"
    )
    if abs(farthest.ahead) - farthest.bound > _SKEW_S:
        return missing("clock", told, "clocks that agree would let you compare the logs of machines (chrony or ntpd)")
    return ok("clock", told)


def _rates(group: Group) -> Iterator[Finding]:
    """Yield the rates of the collective and of neighbors, or why there are none."""
    errors = list(dict.fromkeys(rates.error for rates in group.rates if rates.error))
    if errors:
        advice = "start again with NCCL_DEBUG=INFO, and see that NCCL_SOCKET_IFNAME fits the machines' network"
        if group.backend == "gloo":
            advice = "see whether a firewall is between the machines, and that GLOO_SOCKET_IFNAME fits their network"
        yield wrong("all-reduce", f"over {group.backend}: {'; '.join(errors[:3])}", advice)
        return
    what = f"{group.bytes // 2**20} MiB over {group.backend}"
    yield ok("all-reduce", f"{what}: {_spread([rates.all_reduce for rates in group.rates])} over the ranks")
    links = [link for rates in group.rates for link in rates.links]
    slowest = min(links, key=lambda link: link.rate)
    told = f"{what}: {_spread([link.rate for link in links])}; slowest between {_ends(group, slowest)}"
    between = [link for link in links if _crosses(group, link)]
    limit = _SLOW_LINK * statistics.median(link.rate for link in between) if between else 0.0
    slow = [link for link in between if link.rate < limit]
    if slow and group.backend == "nccl":
        named = ", ".join(_ends(group, link) for link in slow[:3])
        advice = f"all ranks wait for the slowest. Compare network adapters, cables and switches between {named}"
        yield wrong("neighbors", told, advice)
    else:
        yield ok("neighbors", told)


def _crosses(group: Group, link: Link) -> bool:
    first, second = link.ranks
    return group.ranks[first].host != group.ranks[second].host


def _ends(group: Group, link: Link) -> str:
    return " and ".join(f"rank {rank} ({group.ranks[rank].host})" for rank in link.ranks)


def _spread(rates: Sequence[float]) -> str:
    low, middle, high = (rate / 1e9 for rate in (min(rates), statistics.median(rates), max(rates)))
    return f"min {low:.2f}, median {middle:.2f}, max {high:.2f} GB/s"
