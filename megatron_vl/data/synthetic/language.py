"""True statements about a scene: captions, phrases with their spans, questions with answers, dialogues, text.

Only unambiguous questions are asked. A color question names a shape that occurs once. A position question names color
and shape. The text documents use the same language, and most of them give the facts first and the sentence after. So a
language model trained on them alone learns to answer from what precedes. Later, an image precedes instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from megatron_vl.data.prompting.coordinates import format_points
from megatron_vl.data.prompting.markup import tagged, write_picture
from megatron_vl.data.sample import Turn
from megatron_vl.data.synthetic.config import SceneConfig
from megatron_vl.data.synthetic.scene import Scene, SceneObject

CENTER_BAND = 0.1
"""An object is in the middle if its center is nearer to the axis of the image than this share of the image."""


@dataclass(frozen=True)
class Phrase:
    """Part of a caption about one object: ``caption[start:end]``."""

    start: int
    end: int
    object: SceneObject


@dataclass(frozen=True)
class Caption:
    """A caption with the spans of its phrases."""

    text: str
    nouns: tuple[Phrase, ...]
    """Phrases such as ``a big red circle``."""
    expressions: tuple[Phrase, ...]
    """Phrases such as ``a big red circle at the top left``."""


@dataclass(frozen=True)
class Question:
    """A question and its short answer."""

    kind: str
    text: str
    answer: str


def position(item: SceneObject, image_size: int) -> str:
    """Return the position of the object's center: ``top left``, ``top``, ..., ``center``."""
    words = [
        _side((item.y + item.side / 2) / image_size, "top", "bottom"),
        _side((item.x + item.side / 2) / image_size, "left", "right"),
    ]
    return " ".join(word for word in words if word) or "center"


def _side(center: float, low: str, high: str) -> str:
    if abs(center - 0.5) < CENTER_BAND:
        return ""
    return low if center < 0.5 else high


def name(item: SceneObject) -> str:
    """Return a name such as ``red circle``, which identifies one object of its scene."""
    return f"{item.color} {item.shape}"


def box_text(item: SceneObject, image_size: int) -> str:
    """Return the box as Qwen-VL writes it, ``(x1,y1),(x2,y2)`` in [0, 1000)."""
    return format_points([value / image_size for value in item.corners])


def describe(scene: Scene) -> Caption:
    """Describe all objects in reading order: ``a big red circle at the top and a small blue star at the left``."""
    text = ""
    nouns: list[Phrase] = []
    expressions: list[Phrase] = []
    for index, item in enumerate(scene.objects):
        if index:
            text += " and " if index == len(scene.objects) - 1 else ", "
        start = len(text)
        text += f"{'an' if item.size[0] in 'aeiou' else 'a'} {item.size} {name(item)}"
        nouns.append(Phrase(start, len(text), item))
        text += f" at the {position(item, scene.image_size)}"
        expressions.append(Phrase(start, len(text), item))
    return Caption(text, tuple(nouns), tuple(expressions))


def _once(scene: Scene, value: Callable[[SceneObject], str]) -> list[SceneObject]:
    """Return the objects whose ``value`` no other object of the scene has."""
    values = [value(item) for item in scene.objects]
    return [item for item in scene.objects if values.count(value(item)) == 1]


def ask(scene: Scene, kind: str, rng: Random, config: SceneConfig) -> Question | None:
    """Return a question of ``kind`` that has one true answer, or None if the scene permits none."""
    if kind == "count":
        return ask_count(scene)
    if kind == "exists":
        return _ask_exists(scene, rng, config)
    if kind == "color":
        items = _once(scene, lambda item: item.shape)
        return Question(kind, f"What color is the {(i := rng.choice(items)).shape}?", i.color) if items else None
    if kind == "shape":
        items = _once(scene, lambda item: item.color)
        return Question(kind, f"What shape is the {(i := rng.choice(items)).color} object?", i.shape) if items else None
    item = rng.choice(scene.objects)
    if kind == "position":
        return Question(kind, f"Where is the {name(item)}?", position(item, scene.image_size))
    assert kind == "size", f"unknown kind of question {kind!r}"
    return Question(kind, f"What size is the {name(item)}?", item.size)


def _ask_exists(scene: Scene, rng: Random, config: SceneConfig) -> Question:
    """Return a question about existence.

    Half of the answers are no. In half of these, the object in question shares the color of an object in the scene.
    """
    if rng.random() < 0.5:
        return Question("exists", f"Is there a {name(rng.choice(scene.objects))}?", "yes")
    present = {name(item) for item in scene.objects}
    color = rng.choice(scene.objects).color if rng.random() < 0.5 else rng.choice(config.colors)
    absent = [f"{color} {shape}" for shape in config.shapes if f"{color} {shape}" not in present]
    return Question("exists", f"Is there a {rng.choice(absent)}?", "no") if absent else ask_count(scene)


def ask_count(scene: Scene) -> Question:
    """Return a question about the number of objects."""
    return Question("count", "How many objects are there?", str(len(scene.objects)))


def ask_several(scene: Scene, rng: Random, config: SceneConfig) -> list[Question]:
    """Return different questions about one scene, ``questions_per_image`` if it permits so many."""
    kinds, weights = zip(*config.question_weights, strict=True)
    questions: dict[str, Question] = {}
    for _ in range(8 * config.questions_per_image):
        question = ask(scene, rng.choices(kinds, weights)[0], rng, config)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == config.questions_per_image:
            break
    return list(questions.values())


def converse(scene: Scene, image: str, rng: Random) -> list[Turn]:
    """Return one to three questions of a user about the image at path ``image``, each with a true answer."""
    item = rng.choice(scene.objects)
    box = box_text(item, scene.image_size)
    exchanges = [
        ("Describe the image.", describe(scene).text),
        (f"Where is the {name(item)}?", f"at the {position(item, scene.image_size)}"),
        (f"Find the {name(item)}.", tagged("ref", f"the {name(item)}") + tagged("box", box)),
        (f"What is in {tagged('box', box)}?", f"a {item.size} {name(item)}"),
        ("How many objects are there?", str(len(scene.objects))),
    ]
    turns: list[Turn] = []
    for question, answer in rng.sample(exchanges, rng.randint(1, 3)):
        prefix = "" if turns else write_picture(1, image)
        turns += [Turn("user", prefix + question), Turn("assistant", answer)]
    return turns


def facts(scene: Scene, rng: Random) -> str:
    """Return the objects' attributes in random order, which replace an image in a text document."""
    parts = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        words = [item.size, item.color, item.shape, position(item, scene.image_size)]
        rng.shuffle(words)
        parts.append(" ".join(words))
    return ". ".join(parts) + "."


def document(scene: Scene, words: list[str], rng: Random, config: SceneConfig) -> str:
    """Return a text document about a scene (or about ``words``), in the language of the image tasks."""
    item = rng.choice(scene.objects)
    box = box_text(item, scene.image_size)
    place = f"{item.size} {position(item, scene.image_size)}"
    kind = rng.random()
    if kind < 0.15:
        return describe(scene).text
    if kind < 0.4:
        return f"{facts(scene, rng)} Generate the caption in English: {describe(scene).text}"
    if kind < 0.7:
        question = ask_several(scene, rng, config)[0]
        return f"{facts(scene, rng)} {question.text} Answer: {question.answer}"
    if kind < 0.8:
        return f"{facts(scene, rng)} the {name(item)} is at {box}"
    if kind < 0.9:
        return f"{place}: {box}. This is a {item.size} {name(item)}"
    return f"{' '.join(words)}. OCR: {' '.join(words)}"
