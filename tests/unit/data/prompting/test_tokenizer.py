"""The tokenizer against the original's own ids, at full and at cut vocabulary."""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.prompting.tokenizer import QwenTokenizer, find_vocab_file, parse_ranks, read_ranks
from megatron_vl.errors import ConfigError, DataError

GOLDEN = json.loads(Path("tests/golden/qwen_vl/qwen_text.json").read_text(encoding="utf-8"))
ALL_RANKS = 151643


@pytest.fixture(scope="module")
def full() -> QwenTokenizer:
    return QwenTokenizer(ALL_RANKS)


@pytest.fixture(scope="module")
def small() -> QwenTokenizer:
    return QwenTokenizer(2048)


def expand(runs: list[list[int]]) -> list[int]:
    return [value for value, count in runs for _ in range(count)]


@pytest.mark.parametrize("case", GOLDEN["tokenize"], ids=lambda case: case["text"][:20])
def test_ids_are_the_originals(full: QwenTokenizer, case: dict[str, Any]) -> None:
    text = re.sub(r"<img>[^<]*</img>", "<img>" + "<imgpad>" * 256 + "</img>", case["text"])
    assert full.encode_with_specials(text) == expand(case["ids_rle"])


TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(["<img>", "</img>", "<imgpad>", "<|im_end|>", "<|endoftext|>", "<ref>", "'ll", "12", " ", "\r\n"])
    | st.sampled_from(["\u0338", "e\u0301", "\u1100", "\u1161", "\ufb01", "\u212b", "你好", "🙂", "👍🏽", "\x00"]),
    max_size=12,
).map("".join)


def appended(tokenizer: QwenTokenizer, text: str) -> list[int]:
    ids = array("i", [7])
    tokenizer.append(ids, text)
    assert ids[0] == 7
    return ids.tolist()[1:]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_in_its_nfc_form_and_makes_no_special_token(full: QwenTokenizer, text: str) -> None:
    for tokenizer in (full, TINY):
        ids = tokenizer.encode(text)
        assert all(token < tokenizer.special.num_bpe_tokens for token in ids)
        assert appended(tokenizer, text) == ids
        assert appended(tokenizer, 100 * text) == tokenizer.encode(100 * text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        parsed = tokenizer.encode_with_specials(text)
        assert tokenizer.decode(parsed) == unicodedata.normalize("NFC", text)


TINY = QwenTokenizer(256)


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert TINY.decode(TINY.encode("a\ud800b")) == "a\ufffdb"
    for text in ("a\ud800b", 200 * "a\ud800b"):
        assert appended(TINY, text) == TINY.encode(text)


def test_special_tokens_follow_the_ranks(small: QwenTokenizer) -> None:
    assert small.encode_with_specials("<|endoftext|><img><imgpad></img>") == [2048, 2262, 2264, 2263]
    assert small.encode_with_specials("<|im_end|><ref>", allowed=["<ref>"])[-1] == small.special.by_text["<ref>"]
    assert 2050 not in small.encode_with_specials("<|im_end|><ref>", allowed=["<ref>"])


def test_decode_keeps_the_special_tokens_it_is_told_to(small: QwenTokenizer) -> None:
    ids = small.encode_with_specials("<ref>a</ref><|endoftext|>") + [5000]
    assert small.decode(ids) == "<ref>a</ref><|endoftext|>"
    assert small.decode(ids, keep_special=False) == "a"
    assert small.decode(ids, keep_special=["<ref>", "</ref>"]) == "<ref>a</ref>"


def test_decode_of_half_a_character_does_not_fail() -> None:
    assert TINY.decode(TINY.encode("é")[:1]) == "\ufffd"


def test_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    content = find_vocab_file().read_bytes()
    (tmp_path / "crlf").write_bytes(content.replace(b"\n", b"\r\n"))
    assert len(read_ranks(tmp_path / "crlf")) == ALL_RANKS
    (tmp_path / "cut").write_bytes(content[:-20])
    with pytest.raises(DataError, match="SHA-256"):
        QwenTokenizer(2048, tmp_path / "cut")
    with pytest.raises(DataError, match="cannot be read"):
        QwenTokenizer(2048, tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 2\n", "line 2"),
        (b"IQ== 0\n??? 1\n", "line 2"),
        (b"IQ== 0\nIQ== 1\n", "line 2"),
        (b"IQ== 0\n", "bytes"),
    ],
)
def test_ranks_with_gaps_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_ranks(content, "file")


@pytest.mark.parametrize("num_bpe_tokens", [255, ALL_RANKS + 1])
def test_impossible_number_of_ranks(num_bpe_tokens: int) -> None:
    with pytest.raises(ConfigError, match="num_bpe_tokens"):
        QwenTokenizer(num_bpe_tokens)
