"""What ``tools/forward.py`` reads: rows as micro-batches, and what is refused before anything is computed."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.errors import DataError
from megatron_vl.evaluation.forward_inputs import ForwardInputs, idle_batch, read_inputs
from tests.helpers.listening import heard
from tests.helpers.tiny import MODEL

SPECIAL, QUERIES, SIZE = SpecialTokens(MODEL.num_bpe_tokens), MODEL.resampler.num_queries, MODEL.image_size
START, END, PAD = SPECIAL.img_start, SPECIAL.img_end, SPECIAL.img_pad
IMAGE = [START, *[PAD] * QUERIES, END]
PIXELS = torch.rand(3, 3, SIZE, SIZE)


def batch(*rows: list[int], labels: Tensor | None = None, images: int | None = None) -> ForwardInputs:
    """Rows padded with zeros, and as many images as their spans if not said otherwise."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    count = sum(row.count(START) for row in rows) if images is None else images
    return ForwardInputs("in.safetensors", ids, PIXELS[:count] if count else None, labels)


def test_each_row_is_a_micro_batch_with_its_own_images() -> None:
    path = [START, 97, 47, *[PAD] * (QUERIES - 2), END]
    inputs = batch([5, *IMAGE, 6, *path, 7], [8, 9], [*IMAGE, 3])
    inputs.check(MODEL)
    first, text, last = inputs.micro_batches(MODEL, labels=None)
    assert first.slots.tolist() == [2, 3, 4, 5, 9, 10, 11, 12]
    assert last.slots.tolist() == [1, 2, 3, 4] and text.slots.numel() == 0
    assert torch.equal(first.pixels, PIXELS[:2]) and torch.equal(last.pixels, PIXELS[2:3])
    assert text.pixels is not None and text.pixels.dtype == torch.uint8, "a blank image keeps the collectives alike"
    for number, each in enumerate((first, text, last)):
        length = inputs.input_ids.shape[1]
        assert torch.equal(each.tokens, inputs.input_ids[number])
        assert each.positions.tolist() == each.supervised.tolist() == list(range(length))
        assert each.cu_seqlens.tolist() == [0, length]


def test_labels_are_shifted_and_need_not_be_the_tokens() -> None:
    labels = torch.tensor([[11, -100, 12, 13], [-100, -100, -100, 14]])
    inputs = batch([1, 2, 3, 4], [5, 6, 7, 8], labels=labels)
    first, second = inputs.micro_batches(MODEL, labels=labels)
    assert (first.supervised.tolist(), first.targets.tolist()) == ([1, 2], [12, 13])
    assert (second.supervised.tolist(), second.targets.tolist()) == ([2], [14])


def test_an_idle_rank_learns_nothing() -> None:
    idle = idle_batch(MODEL)
    assert idle.supervised.numel() == idle.targets.numel() == idle.slots.numel() == 0 and len(idle.tokens) == 1


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (batch([*IMAGE, 1], images=2), "1 image spans, but pixels have 2 images"),
        (batch([*IMAGE, 1], images=0), "1 image spans, but pixels have 0 images"),
        (batch([1, 2], images=1), "0 image spans, but pixels have 1 images"),
        (batch([1], [2, *IMAGE[:-1]]), rf"row 1 .*<img> \({START}\) at \[1\] and </img> \({END}\) at \[\]"),
        (batch([*IMAGE, END]), r"row 0 .*at \[0\] and </img>.*at \[5, 6\]"),
        (batch([START, *[PAD] * (QUERIES - 1), END]), f"the model's {QUERIES} slots"),
        (batch([START, *IMAGE, *IMAGE[1:]]), "expected pairs"),
        (batch([START, START, PAD, PAD, PAD, END, END]), "expected pairs"),
        (batch([1, -1]), r"input_ids\[0, 1\] is -1; the vocabulary has the ids 0 to 499 \(1 such"),
        (batch([1, 2], [500, 501]), r"input_ids\[1, 0\] is 500; .* \(2 such values\)"),
        (batch([1, 2], labels=torch.tensor([[-100, 500]])), r"labels\[0, 1\] is 500; .*, or -100"),
        (batch([1, 2], labels=torch.tensor([[-100, -1]])), r"labels\[0, 1\] is -1"),
        (
            replace(batch([*IMAGE, 1]), pixels=torch.rand(1, 3, SIZE, SIZE // 2)),
            rf"pixels are \[3, {SIZE}, {SIZE // 2}\] each; the model's images are \[3, {SIZE}, {SIZE}\]",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(inputs: ForwardInputs, says: str) -> None:
    with pytest.raises(DataError, match=f"in.safetensors: .*{says}"):
        inputs.check(MODEL)


GOOD = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"ids": GOOD["input_ids"]}, r"no input_ids, which are int64\[b, s\]; found \['ids'\]"),
        ({"input_ids": GOOD["input_ids"].int()}, r"input_ids is int32\[2, 3\]; expected int64\[b, s\]"),
        ({"input_ids": GOOD["input_ids"][0]}, r"input_ids is int64\[3\]; expected int64\[b, s\]"),
        ({"input_ids": GOOD["input_ids"][:0]}, r"int64\[0, 3\]; expected int64\[b, s\], not empty"),
        (GOOD | {"pixels": PIXELS.half()}, r"pixels is float16\[3, 3, .*expected float32\[n, 3, H, W\]"),
        (GOOD | {"pixels": PIXELS[0]}, r"pixels is float32\[3, \d+, \d+\]; expected"),
        (GOOD | {"labels": GOOD["input_ids"][:1].clone()}, r"labels are \[1, 3\]; input_ids are \[2, 3\]"),
        (GOOD | {"labels": torch.tensor([[3, -100, -100]] * 2)}, "labels supervise no token"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(DataError, match=f"--inputs .*in.safetensors: .*{says}"):
        read_inputs(tmp_path / "in.safetensors")


def test_a_file_that_cannot_be_read_is_an_error_of_the_user(tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    for path in (tmp_path / "none.safetensors", torn, tmp_path):
        with pytest.raises(DataError, match=f"--inputs {re.escape(str(path))}: cannot be read"):
            read_inputs(path)


def test_further_tensors_are_named_and_not_read(tmp_path: Path) -> None:
    save_file(GOOD | {"attention_mask": torch.ones(2, 3)}, tmp_path / "in.safetensors")
    with heard(logging.INFO) as messages:
        inputs = read_inputs(tmp_path / "in.safetensors")
    assert "not read: attention_mask" in messages[0] and inputs.pixels is None and inputs.labels is None
