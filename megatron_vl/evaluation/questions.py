"""Questions for ``tools/generate.py`` out of raw data: the prompts of training, and the answers kept aside.

One JSON line a question: ``key``, ``task``, ``image`` (a file beside the questions, put before the prompt),
``prompt`` (the task's own, with the markers of grounding written out), ``reference`` (what training would
have supervised, without the closing token) and, where several annotators have answered, ``annotators``.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megatron_vl.data.prompts import END, render, render_prompt
from megatron_vl.data.recipe import DataRecipe
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import DataError


@dataclass(frozen=True)
class Question:
    """A prompt with its image, and the true answer."""

    key: str
    task: str
    prompt: str
    """What follows the image."""
    reference: str
    image: bytes
    annotators: tuple[str, ...] = ()


def ask(sample: Sample) -> Question | None:
    """The question of a sample of a task with an image; None for text documents and dialogues."""
    if sample.task in ("text", "chat", "interleaved"):
        return None
    prompt = "".join(piece.text for piece in render_prompt(sample) if piece.kind != "image")
    answer = "".join(piece.text for piece in render(sample) if piece.supervised)
    key = f"{sample.source}/{sample.key}"
    return Question(key, sample.task, prompt, answer.removesuffix(END), sample.images[0].data, sample.annotators)


def write_questions(recipe: DataRecipe, path: Path, *, limit: int) -> dict[str, int]:
    """Write the first ``limit`` questions of each source of a recipe; returns how many of each task.

    Images go into a folder beside ``path``, named after it. Raises DataError if nothing can be asked.
    """
    folder = path.with_name(f"{path.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    lines: list[str] = []
    for entry in recipe.sources:
        for question in itertools.islice(_questions(entry.source), limit):
            name = f"{folder.name}/{len(lines):06d}"
            lines.append(json.dumps(_line(question, path.parent, name), ensure_ascii=False) + "\n")
            counts[question.task] = counts.get(question.task, 0) + 1
    if not lines:
        raise DataError(f"{path}: the sources gave no question; are they empty, or text alone?")
    path.write_text("".join(lines), encoding="utf-8")
    return counts


def _questions(source: Source) -> Iterator[Question]:
    for shard in source.shards():
        for item in source.read(shard):
            question = ask(item) if isinstance(item, Sample) else None
            if question is not None:
                yield question


def _line(question: Question, folder: Path, name: str) -> dict[str, str | tuple[str, ...]]:
    """The JSON of a question; its image is stored as ``name`` with the suffix of its format."""
    with Image.open(io.BytesIO(question.image)) as image:
        name += f".{(image.format or 'png').lower()}"
    (folder / name).write_bytes(question.image)
    return {
        "key": question.key,
        "task": question.task,
        "image": name,
        "prompt": question.prompt,
        "reference": question.reference,
        **({"annotators": question.annotators} if question.annotators else {}),
    }
