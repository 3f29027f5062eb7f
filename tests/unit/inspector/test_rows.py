"""What the inspector says of rows is what the rows hold: every token once, its supervision, its image, its shapes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.dataset.rows import RowStore, SegmentKey
from megatron_vl.data.prompting.coordinates import from_cell
from megatron_vl.data.sample import PackedRow
from megatron_vl.inspector.opening import Vocabulary, open_vocabulary
from megatron_vl.inspector.row_view import RowReader, RowView, TokenRun
from megatron_vl.inspector.text import Mark, make_marks, printable
from tests.helpers.tiny import MODEL
from tests.unit.inspector.hostile_data import CAPTIONS, SEQ_LENGTH, SOURCE, make_hostile_data_set

QUERIES = MODEL.resampler.num_queries


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RowStore]:
    store = RowStore(make_hostile_data_set(tmp_path_factory.mktemp("hostile")))
    yield store
    store.close()


@pytest.fixture(scope="module")
def vocabulary(store: RowStore) -> Vocabulary:
    return open_vocabulary(store.prefix, store.manifest)


@pytest.fixture(scope="module")
def views(store: RowStore, vocabulary: Vocabulary) -> list[RowView]:
    reader = RowReader(vocabulary, QUERIES, SEQ_LENGTH)
    return [reader.view(index, store.row(index), store.keys(index)) for index in range(len(store))]


def runs_of(view: RowView) -> list[TokenRun]:
    return [run for segment in view.segments for run in segment.runs]


def bytes_of(marks: tuple[Mark, ...]) -> bytes:
    """What marks were made of."""
    parts = []
    for mark in marks:
        if mark.kind == "byte":
            parts.append(bytes.fromhex(mark.text))
        elif mark.kind == "control":
            parts.append(chr(int(mark.text.removeprefix("U+"), 16)).encode())
        else:
            parts.append(mark.text.encode())
    return b"".join(parts)


def ids_of(run: TokenRun, vocabulary: Vocabulary) -> list[int]:
    """The tokens of a run, worked out from what is shown of it (single bytes are the tiny vocabulary)."""
    special = vocabulary.special
    if run.kind in ("text", "coordinates"):
        return [vocabulary.ranks.index(bytes([value])) for value in bytes_of(run.marks)]
    if run.kind == "picture":
        assert run.picture is not None
        return [special.img_start, *[special.img_pad] * run.picture.num_slots, special.img_end]
    return [special.by_text[run.name] if run.kind == "special" else int(run.name.removeprefix("id "))]


def test_every_token_is_shown_once_with_its_supervision(
    store: RowStore, views: list[RowView], vocabulary: Vocabulary
) -> None:
    for view in views:
        row = store.row(view.index)
        runs = runs_of(view)
        assert [token for run in runs for token in ids_of(run, vocabulary)] == row.tokens.tolist()
        assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
        assert runs[-1].stop == view.length == len(row.tokens)
        shown = [run.supervised for run in runs for _ in range(run.start, run.stop)]
        assert shown == row.supervised.tolist()
        assert view.num_supervised == row.supervised.sum()
        assert view.padding == SEQ_LENGTH - len(row.tokens)
        assert not view.problems


def test_segments_are_those_of_the_row_with_their_keys(store: RowStore, views: list[RowView]) -> None:
    for view in views:
        row, keys = store.row(view.index), store.keys(view.index)
        assert [segment.length for segment in view.segments] == row.segment_lengths.tolist()
        assert [(s.source, s.task, s.key, s.sample_start, s.sample_stop) for s in view.segments] == [
            (key.source, key.task, key.key, key.start, key.stop) for key in keys
        ]
        for segment in view.segments:
            runs = segment.runs
            assert (runs[0].start, runs[-1].stop) == (segment.start, segment.stop)
            assert sum(length for _, length in segment.bands) == segment.length


def test_pictures_stand_at_their_slots(store: RowStore, views: list[RowView], vocabulary: Vocabulary) -> None:
    for view in views:
        row = store.row(view.index)
        pictures = [run for run in runs_of(view) if run.picture is not None]
        assert [run.picture.image_id for run in pictures if run.picture] == row.image_ids.tolist()
        assert [run.start for run in pictures] == np.flatnonzero(row.tokens == vocabulary.special.img_start).tolist()
        assert all(run.picture.num_slots == QUERIES for run in pictures if run.picture)
    assert sum(len(view.pictures) for view in views) == len(CAPTIONS) + 3


def test_shapes_belong_to_the_last_picture_before_them_in_their_segment(views: list[RowView]) -> None:
    chats = {s.key: s for view in views for s in view.segments if s.task == "chat"}
    two, late = chats["chat.json#0"], chats["chat.json#1"]
    first, second = two.pictures
    (one,) = first.shapes
    assert (one.number, one.label, one.points[:2]) == (1, "one", (from_cell(100), from_cell(200)))
    box, quad, unreadable = second.shapes
    assert box.points == tuple(from_cell(cell) for cell in (250, 125, 750, 125, 750, 625, 250, 625))
    assert quad.points == tuple(map(from_cell, range(1, 9)))
    assert unreadable.points == ()
    assert [shape.label for shape in second.shapes] == ["the other"] * 3
    (before,) = late.pictures[0].shapes
    assert before.points[:2] == (from_cell(10), from_cell(20))
    closing = [run for run in two.runs if run.shape is not None]
    assert [(run.name, run.shape.number) for run in closing if run.shape] == [
        ("</box>", 1), ("</box>", 2), ("</quad>", 3), ("</box>", 4)
    ]  # fmt: skip


def test_a_caption_that_spells_tags_is_a_caption(views: list[RowView]) -> None:
    captions = {s.key: s for view in views for s in view.segments if s.source == SOURCE}
    segment = captions["00000.tar/2<i>'&"]
    assert [picture.shapes for picture in segment.pictures] == [()]
    assert CAPTIONS[2] in "".join(mark.text for run in segment.runs for mark in run.marks)


def test_a_character_that_packing_cut_is_shown_as_its_bytes(views: list[RowView]) -> None:
    pieces = [s for view in views for s in view.segments if s.key == "text.jsonl:1"]
    pieces.sort(key=lambda segment: segment.sample_start)
    assert len(pieces) > 2
    cut = [segment for segment in pieces if segment.runs[-1].marks and segment.runs[-1].marks[-1].kind == "byte"]
    assert cut
    text = b"".join(bytes_of(run.marks) for segment in pieces for run in segment.runs)
    assert text.decode() == "汉字" * 700


_SPECIAL = MODEL.num_bpe_tokens + 3 + 205
_TAGS = st.integers(_SPECIAL, _SPECIAL + 9)  # the tags, and one id beyond the vocabulary
_TOKENS = st.lists(st.one_of(st.integers(0, MODEL.num_bpe_tokens - 1), _TAGS), min_size=1, max_size=60)


@settings(deadline=None)
@given(tokens=_TOKENS, data=st.data())
def test_any_sequence_of_tokens_is_shown_whole(vocabulary: Vocabulary, tokens: list[int], data: st.DataObject) -> None:
    supervised = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    cut = data.draw(st.integers(0, len(tokens)))
    row = PackedRow(
        tokens=np.array(tokens, dtype=np.int32),
        supervised=np.array(supervised),
        segment_lengths=np.array([cut, len(tokens) - cut], dtype=np.int32),
        image_ids=np.zeros(0, dtype=np.int64),
    )
    keys = [SegmentKey("s", "text", "k", 0, cut), SegmentKey("s", "text", "k", cut, len(tokens))]
    view = RowReader(vocabulary, QUERIES, 64).view(0, row, keys)
    assert [token for run in runs_of(view) for token in ids_of(run, vocabulary)] == tokens
    for run in runs_of(view):
        covered = supervised[run.start : run.stop]
        assert run.supervised == (any(covered) if run.kind == "picture" else covered[0])
        assert run.kind == "picture" or len(set(covered)) == 1
    assert ("ids outside the vocabulary" in view.problems) == (_SPECIAL + 9 in tokens)
    assert bool(view.pictures) == any("image spans" in problem for problem in view.problems)


def test_contradictions_are_named(vocabulary: Vocabulary) -> None:
    special = vocabulary.special
    tokens = [special.img_start, special.img_pad, special.img_end, 5]
    row = PackedRow(
        tokens=np.array(tokens, dtype=np.int32),
        supervised=np.array([False, True, False, True]),
        segment_lengths=np.array([3, 1], dtype=np.int32),
        image_ids=np.array([7, 8]),
    )
    view = RowReader(vocabulary, QUERIES, 3).view(0, row, [SegmentKey("s", "caption", "k", 0, 3)])
    assert view.problems == (
        "4 tokens, but the longest row has 3",
        "1 image spans, but 2 images",
        f"images of 1 slots, expected {QUERIES}",
        "supervised image slots",
        "the keys are not those of these segments",
    )
    assert [segment.key for segment in view.segments] == ["k", "?"]


@settings(deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode()))
def test_marks_hold_every_byte(data: bytes) -> None:
    assert bytes_of(make_marks(data)) == data


def test_marks_make_visible_what_is_not() -> None:
    marks = make_marks(" a  b\t\r\n\u202e\u00a0\u200b".encode() + b"\xe6\xb1 c ")
    assert [(mark.kind, mark.text) for mark in marks] == [
        ("space", " "), ("plain", "a"), ("space", " "), ("space", " "), ("plain", "b"), ("tab", "\t"),
        ("control", "U+000D"), ("newline", "\n"), ("control", "U+202E"), ("control", "U+00A0"), ("control", "U+200B"),
        ("byte", "E6"), ("byte", "B1"), ("plain", " c"), ("space", " "),
    ]  # fmt: skip


def test_names_are_printable() -> None:
    assert printable("a b\n\u202e\ud800é") == "a b\\u000a\\u202e\\ud800é"
    assert printable("x" * 500) == "x" * 200 + "…"
    printable("".join(map(chr, range(0x11000)))).encode()
