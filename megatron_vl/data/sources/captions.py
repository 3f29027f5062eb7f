"""Choice among several captions of one image.

A record of a caption set is a caption. If an image has several, ``all`` makes a sample of each. ``longest`` (the
paper's rule for academic sets) and ``first`` make a sample of one. The others are skipped as ``other_caption``, so that
every caption is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from megatron_vl.data.formats.shard import Skipped, skipped
from megatron_vl.data.formats.values import as_number, clean_text, words_of
from megatron_vl.data.sample import Sample
from megatron_vl.errors import SkipSample

Choice = Literal["longest", "first", "all"]


def caption_samples(
    image: Sample, captions: Sequence[Any], choice: Choice, scores: Sequence[float | None] = ()
) -> Iterator[Sample | Skipped]:
    """Yield one sample or ``Skipped`` for each caption of an image, and check the captions.

    ``image`` is the sample without text. With several captions, their indices are appended to its key. ``scores``, if
    given, has one entry per caption.
    """
    keys = [image.key] if len(captions) == 1 else [f"{image.key}#{index}" for index in range(len(captions))]
    checked = [_check(key, caption) for key, caption in zip(keys, captions, strict=True)]
    usable = [index for index, caption in enumerate(checked) if isinstance(caption, str)]
    if choice == "longest":
        usable = sorted(usable, key=lambda index: len(str(checked[index])), reverse=True)
    chosen = usable if choice == "all" else usable[:1]
    for index, (key, caption) in enumerate(zip(keys, checked, strict=True)):
        if isinstance(caption, Skipped):
            yield caption
        elif index not in chosen:
            yield Skipped(key, "other_caption", f"{choice} caption of the image: {keys[chosen[0]]}")
        else:
            yield replace(image, key=key, text=caption, score=scores[index] if scores else image.score)


def skip_captions(key: str, captions: Sequence[Any], error: SkipSample) -> Iterator[Skipped]:
    """Yield a ``Skipped`` for every caption of an image that cannot be used."""
    for index in range(len(captions)):
        yield skipped(key if len(captions) == 1 else f"{key}#{index}", error)


def scores_of(found: Any, num_captions: int) -> list[float | None]:
    """Return a score for each caption, from a field with one score or a list of scores.

    If one caption has several scores, the best is used: LAION-COCO's ``top_caption`` is the caption with the best of
    ``all_similarities``. If several captions have one score, it applies to each.

    Raises:
        SkipSample: ``bad_score``.
    """
    scores = [as_score(score) for score in (found if isinstance(found, list) else [found])]
    if len(scores) == num_captions:
        return scores
    if min(len(scores), num_captions) > 1:
        raise SkipSample("bad_score", f"{len(scores)} scores for {num_captions} captions")
    return [max((score for score in scores if score is not None), default=None)] * num_captions


def as_score(value: Any) -> float | None:
    """Return a score in any form of the metadata, or None if there is none (null, NaN, empty).

    Raises:
        SkipSample: ``bad_score`` if it is not a number, because no filter could judge it.
    """
    is_nan = isinstance(value, float) and math.isnan(value)
    if value is None or is_nan or (isinstance(value, str) and value.strip().lower() in ("", "nan", "null", "none")):
        return None
    number = as_number(value)
    if number is None:
        raise SkipSample("bad_score", f"found {value!r:.40}, expected a number")
    return number


def _check(key: str, caption: Any) -> str | Skipped:
    try:
        if caption is None:
            raise SkipSample("no_caption", "null")
        return clean_text(words_of(caption, "caption"), "caption")
    except SkipSample as error:
        return skipped(key, error)
