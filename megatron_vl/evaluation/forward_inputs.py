"""The input of ``tools/forward.py``: rows of token ids with their images and labels, as the original takes them.

A row is one sequence with attention over all of it, in a micro-batch of its own. Rows may be padded on the right with
any ids: attention is causal, so no token sees what follows it. Every token strictly between ``<img>`` and ``</img>`` is
a slot, whatever its id: the original's tokenizer writes the bytes of a path there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_vl.config.schema import ModelConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.images.pixels import blank_pixels
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.errors import DataError
from megatron_vl.log import log_rank_0

UNSUPERVISED = -100
_FORMS = {
    "input_ids": (torch.int64, "int64[b, s]", 2),
    "pixels": (torch.float32, "float32[n, 3, H, W]", 4),
    "labels": (torch.int64, "int64[b, s]", 2),
}


@dataclass(frozen=True)
class ForwardInputs:
    """A batch; see :func:`read_inputs`."""

    file: str
    """Names the file in messages."""
    input_ids: Tensor
    """int64[b, s]."""
    pixels: Tensor | None = None
    """float32[n, 3, H, W], normalized, in the order of the image spans, row by row."""
    labels: Tensor | None = None
    """int64[b, s], not shifted; -100 at tokens that are not supervised."""

    def check(self, model: ModelConfig) -> None:
        """Raise DataError unless ids, image spans and pixels are those of ``model``."""
        for key, tensor, lowest in (("input_ids", self.input_ids, 0), ("labels", self.labels, UNSUPERVISED)):
            if tensor is not None:
                self._check_ids(key, tensor, lowest, model.language.vocab_size)
        spans = sum(len(starts) for starts in self.span_starts(model))
        images = 0 if self.pixels is None else len(self.pixels)
        if spans != images:
            raise DataError(f"{self.file}: input_ids have {spans} image spans, but pixels have {images} images")
        size = (3, model.image_size, model.image_size)
        if self.pixels is not None and tuple(self.pixels.shape[1:]) != size:
            raise DataError(
                f"{self.file}: pixels are {list(self.pixels.shape[1:])} each; the model's images are {list(size)}"
            )

    def span_starts(self, model: ModelConfig) -> list[Tensor]:
        """Return for each row int64[k], the positions of ``<img>``. Raises DataError if a span is not whole."""
        special, queries = SpecialTokens(model.num_bpe_tokens), model.resampler.num_queries
        rows = []
        for number, ids in enumerate(self.input_ids):
            starts, ends = (torch.nonzero(ids == marker).flatten() for marker in (special.img_start, special.img_end))
            if not torch.equal(starts + queries + 1, ends) or (starts.diff() <= queries + 1).any():
                raise DataError(
                    f"{self.file}: row {number} of input_ids has <img> ({special.img_start}) at {starts.tolist()} "
                    f"and </img> ({special.img_end}) at {ends.tolist()}; expected pairs with the model's {queries} "
                    "slots between them"
                )
            rows.append(starts)
        return rows

    def micro_batches(self, model: ModelConfig, *, labels: Tensor | None) -> list[MicroBatch]:
        """Return each row as a micro-batch. Labels are the targets; without them the head runs on every position."""
        batches, image = [], 0
        for number, (ids, starts) in enumerate(zip(self.input_ids, self.span_starts(model), strict=True)):
            supervised, targets = torch.arange(len(ids)), torch.zeros_like(ids)
            if labels is not None:
                following = labels[number, 1:]
                supervised = torch.nonzero(following != UNSUPERVISED).flatten()
                targets = following[supervised]
            pixels = self.pixels[image : image + len(starts)] if self.pixels is not None else None
            image += len(starts)
            batches.append(_row_batch(ids, starts, pixels, model=model, heads=(supervised, targets)))
        return batches

    def _check_ids(self, key: str, ids: Tensor, lowest: int, vocab_size: int) -> None:
        wrong = torch.nonzero(((ids < 0) & (ids != lowest)) | (ids >= vocab_size))
        if len(wrong):
            row, position = wrong[0].tolist()
            also = "" if lowest == 0 else f", or {lowest}"
            raise DataError(
                f"{self.file}: {key}[{row}, {position}] is {ids[row, position]}; the vocabulary has the ids "
                f"0 to {vocab_size - 1}{also} ({len(wrong)} such values)"
            )


def read_inputs(path: Path) -> ForwardInputs:
    """Read a safetensors file with ``input_ids`` and optional ``pixels`` and ``labels``.

    Raises:
        DataError: if it cannot be read, or a tensor is missing, of another type or of another shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"--inputs {path}: cannot be read ({error}); expected a safetensors file") from error
    if "input_ids" not in tensors:
        raise DataError(f"--inputs {path}: no input_ids, which are int64[b, s]; found {sorted(tensors) or 'nothing'}")
    if ignored := sorted(tensors.keys() - _FORMS.keys()):
        log_rank_0(f"{path}: not read: {', '.join(ignored)}")
    for key, (dtype, form, dimensions) in _FORMS.items():
        found = tensors.get(key)
        if found is not None and (found.dtype != dtype or found.dim() != dimensions or found.numel() == 0):
            shape = f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
            raise DataError(f"--inputs {path}: {key} is {shape}; expected {form}, not empty")
    labels = tensors.get("labels")
    if labels is not None and labels.shape != tensors["input_ids"].shape:
        shapes = f"{list(labels.shape)}; input_ids are {list(tensors['input_ids'].shape)}"
        raise DataError(f"--inputs {path}: labels are {shapes}, and expected of the same shape")
    if labels is not None and (labels[:, 1:] == UNSUPERVISED).all():
        raise DataError(f"--inputs {path}: labels supervise no token that follows another; leave them out, or set some")
    return ForwardInputs(str(path), tensors["input_ids"], tensors.get("pixels"), labels)


def idle_batch(model: ModelConfig) -> MicroBatch:
    """Return a micro-batch without a supervised token, for a data-parallel rank that has fewer rows than others."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return _row_batch(torch.zeros(1, dtype=torch.int64), nothing, None, model=model, heads=(nothing, nothing))


def _row_batch(
    ids: Tensor, starts: Tensor, pixels: Tensor | None, *, model: ModelConfig, heads: tuple[Tensor, Tensor]
) -> MicroBatch:
    """Return one row as a micro-batch. ``heads`` are the positions that run through the head, and their targets."""
    images, length = len(starts), len(ids)
    slots = starts[:, None] + torch.arange(1, model.resampler.num_queries + 1)
    blank = torch.from_numpy(blank_pixels(1, model.image_size))
    return MicroBatch(
        tokens=ids,
        positions=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        span_lengths=(length,),
        supervised=heads[0],
        targets=heads[1],
        slots=slots.flatten(),
        pixels=pixels if pixels is not None and images else blank,
        span_images=torch.arange(images),
        num_images=max(images, 1),
        num_samples=1,
        num_tokens=length,
        squared_spans=length**2,
    )
