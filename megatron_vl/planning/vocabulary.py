"""Compute the padded number of rows of the word embedding and the output layer.

Tensor parallelism splits vocabulary rows evenly, and matrix units prefer multiples of 128. So the table is padded to a
multiple of 128 x TP. The padding depends on the layout: it is in no logits, no loss, and no exported file.
"""

from __future__ import annotations

_ALIGNMENT = 128


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """Return ``vocab_size`` rounded up to a multiple of 128 x ``tensor_size``."""
    multiple = _ALIGNMENT * tensor_size
    return -(-vocab_size // multiple) * multiple
