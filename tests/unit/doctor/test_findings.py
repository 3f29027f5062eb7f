"""Findings of all ranks become lines: rank 0's, and what is worse or otherwise wrong elsewhere."""

from __future__ import annotations

from megatron_vl.doctor.findings import Kind, count, format_rows, join, missing, ok, wrong


def test_the_findings_of_rank_0_stand_for_those_like_them() -> None:
    rows = join([[ok("disk", "5 GiB")], [ok("disk", "4 GiB")]], ["a", "b"])
    assert [(row.finding.found, row.hosts) for row in rows] == [("5 GiB", ("a", "b"))]


def test_what_is_worse_elsewhere_follows_with_its_machines() -> None:
    by_rank = [
        [ok("disk", "5 GiB"), ok("cores", "2")],
        [wrong("disk", "full", "free some")],
        [wrong("disk", "gone", "x")],
    ]
    rows = join(by_rank, ["a", "b", "c"])
    assert [(row.finding.found, row.hosts) for row in rows] == [("5 GiB", ("a",)), ("full", ("b", "c")), ("2", ("a",))]


def test_a_machine_is_named_once_however_many_ranks_it_has() -> None:
    rows = join([[wrong("disk", "full", "x")], [wrong("disk", "full", "x")], [ok("disk", "5")]], ["a", "a", "b"])
    assert [(row.finding.found, row.hosts) for row in rows] == [("full", ("a",))]


def test_what_other_ranks_alone_have_is_told_if_it_is_wrong() -> None:
    rows = join([[ok("cores", "2")], [ok("NCCL_DEBUG", "INFO"), wrong("own name", "127.0.1.1", "x")]], ["a", "b"])
    assert [row.finding.name for row in rows] == ["cores", "own name"]


def test_lines_are_aligned_and_name_the_machines_of_bad_ones() -> None:
    hosts = [f"n{number}" for number in range(11)]
    by_rank = [[ok("disk", "5 GiB"), missing("CUDA devices", "none", "one would help")]]
    by_rank += [[wrong("disk", "full", "free some")] for _ in hosts[1:]]
    assert format_rows(join(by_rank, hosts), hosts=11).splitlines() == [
        "ok       disk          5 GiB",
        "wrong    disk          full: free some [n1, n2, n3, n4, n5, n6, n7, n8 and 2 more]",
        "missing  CUDA devices  none: one would help [n0]",
    ]
    assert format_rows(join([[wrong("disk", "full", "x")]], ["a"]), hosts=1) == "wrong    disk  full: x"


def test_rows_are_counted_and_written() -> None:
    rows = join([[ok("disk", "5"), missing("Apex", "not installed", "it would help"), ok("cores", "2")]], ["a"])
    assert count(rows) == "2 ok, 1 missing, 0 wrong"
    assert rows[1].as_json() == {
        "name": "Apex", "kind": "missing", "found": "not installed", "advice": "it would help", "hosts": ["a"],
    }  # fmt: skip
    assert max(row.finding.kind for row in rows) == Kind.MISSING
