"""What follows from ranks that are not alike, from slow links, and from ranks that have not met."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vl.doctor.facts import Address, Clock, Facts, Group, Link, Package, Rates
from megatron_vl.doctor.findings import Kind
from megatron_vl.doctor.judge_group import differences, judge, judge_group
from megatron_vl.launch import Launch
from tests.unit.doctor.made_up import A100, LAPTOP, NODE, only, with_packages

OK, MISSING, WRONG = Kind
GB = 1e9


def ranks(*hosts: str, facts: Facts = LAPTOP) -> tuple[Facts, ...]:
    """A rank on each of the machines."""
    launches = [Launch(rank, len(hosts), 0) for rank in range(len(hosts))]
    return tuple(replace(facts, launch=launch, host=host) for launch, host in zip(launches, hosts, strict=True))


def ring(*rates: float) -> tuple[Rates, ...]:
    """Each rank has timed the link to its successor; its collective ran at 2 GB/s."""
    count = len(rates)
    return tuple(Rates(2 * GB, (Link((i, (i + 1) % count), rate * GB),)) for i, rate in enumerate(rates))


def test_one_rank_has_nobody_to_compare_with() -> None:
    assert judge_group(Group((LAPTOP,))) == []


def test_ranks_that_are_alike_and_their_rates() -> None:
    group = Group(ranks("a", "a"), "gloo", 2**23, (Rates(1e9, (Link((0, 1), 5e8),)), Rates(3e9)))
    findings = judge_group(group)
    assert {finding.kind for finding in findings} == {OK}
    assert only(findings, "ranks").found == "2 on 1 machine"
    collective = "8 MiB over gloo: min 1.00, median 2.00, max 3.00 GB/s over the ranks"
    assert only(findings, "all-reduce").found == collective
    told = "8 MiB over gloo: min 0.50, median 0.50, max 0.50 GB/s; slowest between rank 0 (a) and rank 1 (a)"
    assert only(findings, "neighbors").found == told


def test_differences_are_named_by_machine() -> None:
    first, second, third = ranks("a", "b", "c")
    second = with_packages(second, torch=Package("2.12.1"), apex=Package("0.1"))
    third = with_packages(third, torch=Package("2.13.0+cpu", "OSError"))
    found = only(judge_group(Group((first, second, third))), "same versions")
    assert found.kind == WRONG
    assert found.found == "torch 2.13.0+cpu on a, 2.12.1 on b, 2.13.0+cpu (broken) on c; apex absent on a c, 0.1 on b"


def test_kinds_of_devices_and_builds_are_compared() -> None:
    first, second = ranks("a", "b", facts=NODE)
    second = replace(second, python=(3, 12, 0), torch=replace(second.torch, cuda="13.0", nccl="2.27", devices=(A100,)))
    assert [text.split()[0] for text in differences((first, second))] == ["Python", "CUDA", "NCCL", "CUDA"]
    assert differences((first, second))[-1] == "CUDA device NVIDIA H100 on a, NVIDIA A100 on b"
    assert differences((first, replace(second, python=first.python, torch=first.torch))) == []


def test_extras_may_differ() -> None:
    first, second = ranks("a", "b")
    assert differences((first, with_packages(second, matplotlib=Package()))) == []


def test_another_environment_is_told_and_is_not_wrong() -> None:
    first, second = ranks("a", "b")
    second = replace(second, environment={"NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "1"})
    found = only(judge_group(Group((first, second))), "environment")
    assert (found.kind, found.found) == (OK, "differs between ranks: NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("ahead", "bound", "kind", "side"),
    [(0.5, 0.001, OK, "ahead of"), (-3.0, 0.001, MISSING, "behind"), (3.0, 2.5, OK, "ahead of")],
)
def test_clocks(ahead: float, bound: float, kind: Kind, side: str) -> None:
    """The third answer took so long that the clocks may be half a second apart."""
    group = Group(ranks("a", "b", "c"), clocks=(Clock(1, 0.01, 0.001), Clock(2, ahead, bound)))
    found = only(judge_group(group), "clock")
    assert (
        found.kind == kind and f"{abs(ahead):.4f} s apart, to {bound:.4f} s (rank 2, c, {side} rank 0)" in found.found
    )


def test_a_slow_link_between_machines_is_wrong_over_nccl() -> None:
    """Links between machines: 10, 10, 4 and 10 GB/s; the limit is half of their median."""
    group = Group(ranks("a", "b", "c", "d"), "nccl", 2**27, ring(10, 10, 4, 10))
    found = only(judge_group(group), "neighbors")
    assert found.kind == WRONG and "slowest between rank 2 (c) and rank 3 (d)" in found.found
    assert found.advice.endswith("switches between rank 2 (c) and rank 3 (d)")
    assert only(judge_group(replace(group, backend="gloo")), "neighbors").kind == OK
    assert only(judge_group(replace(group, rates=ring(10, 10, 5, 10))), "neighbors").kind == OK


def test_links_of_one_machine_may_differ() -> None:
    """Some GPUs of a machine have NVLink between them, and others do not."""
    group = Group(ranks("a", "a", "a", "a"), "nccl", 2**27, ring(400, 20, 400, 20))
    assert only(judge_group(group), "neighbors").kind == OK


def test_a_collective_that_failed_is_wrong_and_said_once() -> None:
    failed = Rates(error="NCCL error: unhandled system error")
    findings = judge_group(Group(ranks("a", "b"), "nccl", 2**27, (failed, failed)))
    found = only(findings, "all-reduce")
    assert (found.kind, found.found) == (WRONG, "over nccl: NCCL error: unhandled system error")
    assert "NCCL_DEBUG=INFO" in found.advice and "neighbors" not in [finding.name for finding in findings]


def test_ranks_that_have_not_met() -> None:
    own = replace(ranks("a", "b", facts=NODE)[0], master=Address("a", ("10.0.0.1",), is_here=True))
    found = only(judge_group(Group((own,), error="ranks [1] have not come")), "meeting")
    assert found.kind == WRONG and found.found == "ranks [1] have not come" and "/etc/hosts" not in found.advice
    local = replace(own, own_name=Address("a", ("127.0.1.1",), is_here=True))
    found = only(judge_group(Group((local,), error="ranks [1] have not come")), "meeting")
    assert "a is 127.0.1.1 here: correct /etc/hosts" in found.advice
    assert [finding.name for finding in judge_group(Group((own,), error="x"))] == ["meeting"]


def test_a_rank_that_died_leaves_what_was_found_before() -> None:
    findings = judge_group(Group(ranks("a", "b"), error="Connection closed by peer"))
    assert only(findings, "same versions").kind == OK
    assert only(findings, "meeting").found.startswith("a rank has ended, or is out of reach: Connection closed")


def test_all_machines_are_judged() -> None:
    first, second = ranks("a", "b")
    rows = judge(Group((first, with_packages(second, tqdm=Package()))))
    found = {row.hosts: row.finding.kind for row in rows if row.finding.name == "packages"}
    assert found == {("a",): OK, ("b",): WRONG}
    assert next(row.hosts for row in rows if row.finding.name == "ranks") == ("a", "b")
