"""Image features into the slots of the embedded line."""

from __future__ import annotations

from torch import Tensor

from megatron_vl.errors import DataError


def fuse(embedded: Tensor, features: Tensor, *, slots: Tensor) -> Tensor:
    """Overwrite the embeddings at the slots by image features.

    A batch without slots still has one blank image, whose features enter as zero times their sum: so every rank runs
    the same collectives and every weight gets a gradient, and nothing changes in either.

    Args:
        embedded: [t, h], the word embeddings of the packed line.
        features: [queries, n, h], the features of n images.
        slots: int64[n * queries], positions to fill, image by image; or empty.

    Raises:
        DataError: the slots are not as many as the features.
    """
    if slots.numel() == 0:
        return embedded + 0.0 * features.sum().to(embedded.dtype)
    queries, number, width = features.shape
    if slots.numel() != queries * number:
        raise DataError(
            f"a micro-batch has {slots.numel()} image slots, but {number} images x {queries} queries = "
            f"{queries * number} features: the data set was prepared for another num_queries, or a row is corrupt"
        )
    filling = features.transpose(0, 1).reshape(-1, width).to(embedded.dtype)
    return embedded.index_copy(0, slots, filling)
