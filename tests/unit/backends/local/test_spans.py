from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vl.backends.local.spans import group_spans

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=24)


@given(LENGTHS)
@example([64, 64, 64])
@example([1])
@example([16, 17, 15, 32, 33])
@settings(max_examples=80, deadline=None, derandomize=True)
def test_groups_are_a_partition_of_the_line(lengths: list[int]) -> None:
    total, starts = sum(lengths), [0, *accumulate(lengths)][:-1]
    groups = group_spans(lengths)
    spans = {}
    for group in groups:
        assert group.positions.shape == (group.num_spans, group.longest)
        for line in group.positions.tolist():
            span = [position for position in line if position != total]
            assert line == span + [total] * (len(line) - len(span)), "padding comes last"
            assert span == list(range(span[0], span[0] + len(span)))
            spans[span[0]] = len(span)
    assert spans == dict(zip(starts, lengths, strict=True))


@given(LENGTHS)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_padding_at_most_doubles_a_span(lengths: list[int]) -> None:
    groups = group_spans(lengths)
    for group in groups:
        real = (group.positions < sum(lengths)).sum(dim=1)
        assert ((group.longest < 2 * real) | (group.longest <= 16)).all()
    assert len(groups) <= 6, "one for each power of two from 16 to 512"


def test_equal_spans_are_one_group_without_padding() -> None:
    (group,) = group_spans([7, 7, 7])
    assert torch.equal(group.positions, torch.arange(21).view(3, 7))
