"""Several captions of one image: which of them become samples.

A record of a caption set is a caption. Of an image with several, ``all`` makes a sample of each, ``longest``
(the paper's rule for academic sets) and ``first`` of one; the others are skipped as ``other_caption``, so
that all captions that were read are accounted for.
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
    """One sample or ``Skipped`` for each of an image's captions, which are checked here.

    ``image`` is the sample without text; with several captions their indices are appended to its key.
    ``scores``, if given, belong to the captions one by one.
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
    """All captions of an image that cannot be used."""
    for index in range(len(captions)):
        yield skipped(key if len(captions) == 1 else f"{key}#{index}", error)


def scores_of(found: Any, num_captions: int) -> list[float | None]:
    """A score for each caption, from the field that holds one or a list of them; raises SkipSample('bad_score').

    Of several scores of one caption the best: LAION-COCO's ``top_caption`` is the one with the best of
    ``all_similarities``. One score of several captions is that of each.
    """
    scores = [as_score(score) for score in (found if isinstance(found, list) else [found])]
    if len(scores) == num_captions:
        return scores
    if min(len(scores), num_captions) > 1:
        raise SkipSample("bad_score", f"{len(scores)} scores for {num_captions} captions")
    return [max((score for score in scores if score is not None), default=None)] * num_captions


def as_score(value: Any) -> float | None:
    """A score in whatever form the metadata has it; none where there is none (null, NaN, empty).

    Raises SkipSample('bad_score') for what is no number, since no filter could judge it.
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
