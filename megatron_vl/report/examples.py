"""Make held-out examples for the report: the image with its boxes drawn, and the true and the predicted answer."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from megatron_vl.data.images.decode import decode_image
from megatron_vl.data.prompting.grounding import first_box, parse_grounding
from megatron_vl.data.sample import Region
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.evaluation.questions import Prediction
from megatron_vl.evaluation.scoring import SCORERS, read_words, reference_iou
from megatron_vl.generation.drawing import draw_regions

TRUTH_COLOR = "#1a7f37"
PREDICTION_COLOR = "#d1242f"
_MIN_SIDE = 336
"""Images smaller than this are enlarged before boxes are drawn, so that the lines do not cover them."""
_MAX_SHOWN = 160
"""Maximum number of characters of an answer."""

_MARKUP = re.compile(r"<img>.*?</img>|<[^>]*>", re.DOTALL)


@dataclass(frozen=True)
class ExampleCard:
    """One card of the report."""

    question: str
    truth: str
    said: str
    said_without_images: str
    verdict: str
    good: bool
    image: str
    """A data URI, or empty."""


def make_examples(
    predictions: Sequence[Prediction], *, without_images: Mapping[str | int | None, Prediction], task: str, count: int
) -> tuple[ExampleCard, ...]:
    """Make cards of the first ``count`` predictions of a task, in the order of the file, without selection.

    ``without_images`` maps keys to the blind model's predictions.

    Raises:
        DataError: if an image cannot be read.
    """
    chosen = [prediction for prediction in predictions if prediction.task == task][:count]
    return tuple(_make_example(prediction, without_images.get(prediction.key)) for prediction in chosen)


def _make_example(prediction: Prediction, without_images: Prediction | None) -> ExampleCard:
    verdict, good = _verdict(prediction)
    return ExampleCard(
        question=readable(prediction.text),
        truth=_answer(prediction.task, prediction.references[0]),
        said=_answer(prediction.task, prediction.prediction),
        said_without_images="" if without_images is None else _answer(prediction.task, without_images.prediction),
        verdict=verdict,
        good=good,
        image=_draw(prediction),
    )


def readable(text: str) -> str:
    """Return a text without the model's markup, on one line."""
    return " ".join(_MARKUP.sub(" ", text).split())


def _answer(task: str, text: str) -> str:
    """Return a true or predicted answer for display: words or plain text, cut if it is very long."""
    return _cut(" ".join(read_words(text)) if task == "ocr" else readable(text))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _verdict(prediction: Prediction) -> tuple[str, bool]:
    if prediction.task not in SCORERS:
        return "", True
    points = SCORERS[prediction.task](prediction)
    good = points.earned == points.possible
    if prediction.task == "referring":
        return f"IoU {math.floor(100 * reference_iou(prediction)) / 100:.2f}", good
    if prediction.task == "ocr":
        return f"{points.earned:.0f} of {points.possible:.0f} words", good
    return ("right" if good else f"{points.earned:.2f}" if points.earned else "wrong"), good


def _draw(prediction: Prediction) -> str:
    """Return the image of a prediction as a data URI, true shapes in green and predicted ones in red."""
    if not prediction.images:
        return ""
    path = prediction.file.parent / prediction.images[0]
    try:
        image = decode_image(path.read_bytes())
    except (OSError, SkipSample) as error:
        raise DataError(f"{path}: cannot read the image of prediction {prediction.key}: {error}") from None
    scale = max(1.0, _MIN_SIDE / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    if prediction.task in ("referring", "ocr", "grounded_caption"):
        for text, color in (
            (prediction.references[0], TRUTH_COLOR),
            (prediction.prediction, PREDICTION_COLOR),
        ):
            image = draw_regions(image, _regions(text), color)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _regions(text: str) -> tuple[Region, ...]:
    """Return the regions of a text; a bare pair of points outside of tags counts as one."""
    regions = parse_grounding(text).regions
    box = first_box(text)
    return regions or (() if box is None else (Region("", boxes=(box,)),))
