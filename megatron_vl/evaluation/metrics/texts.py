"""Longer texts: captions that must match exactly, and the edit-distance score."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
"""Similarities below this count as wrong (DocVQA's protocol)."""


def normalize_caption(text: str) -> str:
    """Return the text in lower case, with single spaces and without a full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def caption_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the caption equals a reference after :func:`normalize_caption`, else 0.0."""
    caption = normalize_caption(prediction)
    return float(any(caption == normalize_caption(reference) for reference in references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity of one question to its best reference, set to 0 below 0.5.

    The distance is taken between lower-case texts with single spaces, but it is divided by the length of the raw texts,
    as the official DocVQA script does.
    """
    best = max((_similarity(prediction, reference) for reference in references), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, reference: str) -> float:
    length = max(len(prediction.upper()), len(reference.upper()))
    if length == 0:
        return 1.0
    distance = Levenshtein.distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    return 1.0 - distance / length
