"""Programs that fit together, and programs that would hang."""

from __future__ import annotations

from dataclasses import replace

from megatron_vl.rehearsal.matching import find_faults
from megatron_vl.rehearsal.records import Operation, Wait
from tests.unit.rehearsal.made_up import rank, received, reduced, sent


def test_programs_that_fit_have_no_fault() -> None:
    first = rank(0, sent(1), Wait(0), received(1), Wait(2), reduced(), Wait(4))
    second = rank(1, received(0), Wait(0), sent(0), Wait(2), reduced(), Wait(4))
    assert find_faults([first, second]) == []


def test_both_may_send_first_if_neither_waits_in_between() -> None:
    first = rank(0, sent(1), received(1), Wait(0), Wait(1))
    second = rank(1, sent(0), received(0), Wait(0), Wait(1))
    assert find_faults([first, second]) == []


def test_two_ranks_that_wait_for_each_other_hang() -> None:
    first = rank(0, received(1), Wait(0), sent(1), Wait(2))
    second = rank(1, received(0), Wait(0), sent(0), Wait(2))
    faults = find_faults([first, second])
    assert len(faults) == 2
    assert "rank 0 (pipeline rank 0" in faults[0] and "waits for its receive of 4x1x8 bfloat16" in faults[0]
    assert "rank 1 has not come" in faults[0] and "rank 0 has not come" in faults[1]


def test_a_message_before_a_collective_and_one_after_it_hang() -> None:
    first = rank(0, sent(1), Wait(0), reduced(), Wait(2))
    second = rank(1, reduced(), Wait(0), received(0), Wait(2))
    assert len(find_faults([first, second])) == 2


def test_a_message_of_another_shape_is_found() -> None:
    first = rank(0, sent(1), Wait(0), sent(1, (2, 1, 8)), Wait(2))
    second = rank(1, received(0), Wait(0), received(0), Wait(2))
    (fault,) = find_faults([first, second])
    assert "rank 0 asks for send of 2x1x8 bfloat16, and rank 1 for receive of 4x1x8 bfloat16" in fault
    assert "number 1" in fault


def test_messages_in_another_order_are_found() -> None:
    first = rank(0, sent(1, (1, 1, 8)), sent(1, (2, 1, 8)), Wait(0), Wait(1))
    second = rank(1, received(0, (2, 1, 8)), received(0, (1, 1, 8)), Wait(0), Wait(1))
    assert len(find_faults([first, second])) == 2


def test_a_message_that_nobody_receives_is_found() -> None:
    (fault,) = find_faults([rank(0, sent(1)), rank(1)])
    assert fault.startswith("rank 0 comes to send of 4x1x8 bfloat16") and fault.endswith("rank 1 never does")


def test_a_collective_that_one_rank_leaves_out_is_found() -> None:
    (fault,) = find_faults([rank(0, reduced(), Wait(0), reduced(), Wait(2)), rank(1, reduced(), Wait(0))])
    assert "rank 0 comes to all-reduce of 6 float32 (number 1" in fault and "rank 1 never does" in fault


def test_collectives_of_another_kind_size_or_source_are_found() -> None:
    for other in (reduced(7), reduced(kind="reduce-scatter")):
        assert len(find_faults([rank(0, reduced()), rank(1, other)])) == 1
    broadcast = Operation("broadcast", "pair", ((3,),), "float32", 12, peer=0)
    assert find_faults([rank(0, broadcast), rank(1, broadcast)]) == []
    assert len(find_faults([rank(0, broadcast), rank(1, replace(broadcast, peer=1))])) == 1


def test_ranks_that_are_not_rehearsed_are_not_waited_for() -> None:
    assert find_faults([rank(0, sent(1), Wait(0), reduced(), Wait(2))]) == []
