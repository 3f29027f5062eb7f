"""Insert image features into the slots of the embedded token sequence."""

from __future__ import annotations

from torch import Tensor

from megatron_vl.errors import DataError


def fuse(embedded: Tensor, features: Tensor, *, slots: Tensor, span_images: Tensor) -> Tensor:
    """Overwrite the embeddings at the slots with image features; return [t, h].

    A batch without slots still has one blank image. Its features enter as zero times their sum. So every rank runs the
    same collectives and every weight gets a gradient, while outputs and gradients stay unchanged.

    Args:
        embedded: [t, h], the word embeddings of the packed sequence.
        features: [queries, n, h], the features of n images.
        slots: int64[k * queries], positions to fill, span by span; or empty.
        span_images: int64[k], the image of each span.

    Raises:
        DataError: if the number of slots differs from the number of features of the spans.
    """
    if slots.numel() == 0:
        return embedded + 0.0 * features.sum().to(embedded.dtype)
    queries, _, width = features.shape
    if slots.numel() != queries * span_images.numel():
        raise DataError(
            f"a micro-batch has {slots.numel()} image slots, but {span_images.numel()} image spans x {queries} queries "
            f"= {queries * span_images.numel()} features: the data set was prepared for another num_queries, or a row "
            "is corrupt"
        )
    filling = features.index_select(1, span_images).transpose(0, 1).reshape(-1, width)
    return embedded.index_copy(0, slots, filling.to(embedded.dtype))
