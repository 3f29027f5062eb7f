"""Make questions from raw data: the prompts of training, with the answers kept apart, without the closing token.

Left out and counted are samples that preparation itself leaves out (filters of single samples, images that cannot be
used), that have no question, or that hold grounding markers as words, which generation would take for markers.
"""

from __future__ import annotations

import io
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from megatron_vl.data.filters.rules import SampleFilter
from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.images.decode import check_image
from megatron_vl.data.prepare.recipe import DataRecipe, SourceEntry
from megatron_vl.data.prompting.markup import parse_markup, without_picture
from megatron_vl.data.prompting.tasks import END, render, render_prompt
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.evaluation.questions import Question, to_lines
from megatron_vl.files import write_whole


def ask(sample: Sample) -> Question | None:
    """Return the question of a sample; None for documents, and for dialogues that do not begin with ``Picture 1``.

    Raises:
        SkipSample: ``markup_in_text``, or the reason why there is no prompt.
    """
    if sample.task in ("text", "interleaved"):
        return None
    if sample.task == "chat":
        return _ask_in_dialogue(sample)
    pieces = [piece for piece in render_prompt(sample) if piece.kind != "image"]
    prompt = unicodedata.normalize("NFC", "".join(piece.text for piece in pieces))
    if [piece.kind for piece in parse_markup(prompt, images=False)] != [piece.kind for piece in pieces]:
        raise SkipSample("markup_in_text", f"{prompt:.60}")
    answer = "".join(piece.text for piece in render(sample) if piece.supervised)
    key, references = f"{sample.source}/{sample.key}", (answer.removesuffix(END),)
    return Question(key=key, task=sample.task, prompt=prompt, references=references, annotators=sample.annotators)


def _ask_in_dialogue(sample: Sample) -> Question | None:
    """Return the first exchange of a dialogue, for ``generate.py --chat-format chatml``.

    That writes ``Picture 1`` before the prompt. A dialogue with its only image in another form would be asked in other
    words than it was trained in, so it has no question.
    """
    exchange = [turn for turn in sample.turns if turn.role != "system"][:2]
    if [turn.role for turn in exchange] != ["user", "assistant"] or len(sample.images) != 1:
        return None
    query = without_picture(exchange[0].text)
    if query is None:
        return None
    system = next((turn.text for turn in sample.turns if turn.role == "system"), None)
    key, references = f"{sample.source}/{sample.key}", (exchange[1].text,)
    return Question(key=key, task="chat", prompt=query, references=references, system=system)


def make_questions(recipe: DataRecipe, path: Path, *, limit: int) -> tuple[Counter[str], Counter[str]]:
    """Write the first ``limit`` questions of each source of a recipe, or as many as the source's own ``limit`` allows.

    Images are written to a folder beside ``path``, named after it.

    Returns:
        The number of questions of each task, and the number of records before them that were left out, by reason.

    Raises:
        DataError: if there is no question.
    """
    folder = path.with_name(f"{path.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    counts, left_out = Counter[str](), Counter[str]()
    questions: list[Question] = []
    for entry in recipe.sources:
        for question, image in itertools.islice(_questions(entry, left_out), min(limit, entry.limit or limit)):
            stored = _store_image(image, folder / f"{len(questions):06d}")
            questions.append(replace(question, images=(f"{folder.name}/{stored.name}",)))
            counts[question.task] += 1
    if not questions:
        lost = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        why = f"left out: {lost}" if lost else "are they empty, or text alone?"
        raise DataError(f"{path}: the sources gave no question; {why}")
    write_whole(path, to_lines(questions))
    return counts, left_out


def _questions(entry: SourceEntry, left_out: Counter[str]) -> Iterator[tuple[Question, bytes]]:
    """Yield the questions of a source and their images; count what is left out in ``left_out``."""
    cleaning = SampleFilter(entry.filters)
    for shard in entry.source.shards():
        for item in entry.source.read(shard):
            try:
                if isinstance(item, Skipped):
                    raise SkipSample(item.reason)
                sample = _as_prepared(item, entry.source, cleaning)
                question = ask(sample)
                if question is None:
                    raise SkipSample("no_question")
            except SkipSample as error:
                left_out[error.reason] += 1
            else:
                yield question, sample.images[0].data


def _as_prepared(sample: Sample, source: Source, cleaning: SampleFilter) -> Sample:
    """Return the sample as preparation stores it. Raises SkipSample if preparation leaves it out."""
    sample = cleaning.apply(sample)
    images = tuple(source.settle(image) for image in sample.images)
    for image in images:
        cleaning.check_image(check_image(image.data))
    return replace(sample, images=images)


def _store_image(data: bytes, path: Path) -> Path:
    """Write an image, and return its path: ``path`` with the suffix of its format."""
    with Image.open(io.BytesIO(data)) as image:
        path = path.with_suffix(f".{(image.format or 'png').lower()}")
    path.write_bytes(data)
    return path
