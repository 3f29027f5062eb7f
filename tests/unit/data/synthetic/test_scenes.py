"""Scenes: what is said of them is true, in words and in pixels; held-out scenes never occur in training."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vl.data.synthetic.config import FULL, TINY, SceneConfig, Split
from megatron_vl.data.synthetic.language import ask_several, box_text, converse, describe, document, position
from megatron_vl.data.synthetic.lexicon import WORDS
from megatron_vl.data.synthetic.render import COLORS, OUTLINES, SHADE, SceneRenderer, draw_mask
from megatron_vl.data.synthetic.scene import Scene, SceneObject, sample_scene, split_of
from megatron_vl.errors import ConfigError

PROFILES = pytest.mark.parametrize("config", [TINY.scene, FULL.scene], ids=["tiny", "full"])
SEEDS = st.integers(0, 2**32)
FEW = settings(derandomize=True, max_examples=60, deadline=None)


def draw(config: SceneConfig, seed: int, split: Split = "train") -> Scene:
    return sample_scene(Random(seed), config, split=split, heldout_percent=10)


def draw_many(config: SceneConfig, count: int, seed: int, split: Split = "train") -> list[Scene]:
    rng = Random(seed)
    return [sample_scene(rng, config, split=split, heldout_percent=10) for _ in range(count)]


@PROFILES
@FEW
@given(seed=SEEDS)
def test_objects_lie_inside_apart_and_are_distinct(config: SceneConfig, seed: int) -> None:
    scene = draw(config, seed)
    covered: Counter[tuple[int, int]] = Counter()
    for item in scene.objects:
        x1, y1, x2, y2 = item.corners
        assert 0 <= x1 < x2 <= config.image_size and 0 <= y1 < y2 <= config.image_size
        assert x1 % config.step == y1 % config.step == 0
        assert dict(config.sizes)[item.size] == x2 - x1 == y2 - y1
        covered.update((x, y) for x in range(x1, x2, 7) for y in range(y1, y2, 7))
    assert max(covered.values()) == 1
    names = [(item.color, item.shape) for item in scene.objects]
    assert len(set(names)) == len(names)
    if config.distinct_attributes:
        assert len({color for color, _ in names}) == len({shape for _, shape in names}) == len(names)


@PROFILES
def test_splits_share_no_scene_whatever_the_seeds(config: SceneConfig) -> None:
    train = {s.key for seed in (1, 2) for s in draw_many(config, 1500, seed)}
    heldout = {s.key for seed in (1, 2, 3) for s in draw_many(config, 300, seed, "heldout")}
    assert len(train) > 500 and len(heldout) > 100
    assert not train & heldout


def test_about_the_configured_share_of_contents_is_held_out() -> None:
    sides = Counter(split_of(f"content {i}", 10) for i in range(4000))
    assert 0.08 < sides["heldout"] / 4000 < 0.12


def test_equal_keys_mean_equal_scenes() -> None:
    scenes = draw_many(TINY.scene, 2000, 5)
    by_key = {scene.key: scene for scene in scenes}
    assert len(by_key) < len(scenes), "some scene must repeat for this test to say anything"
    assert all(by_key[scene.key] == scene for scene in scenes)


@PROFILES
def test_pixels_show_each_object_in_its_box_and_nothing_elsewhere(config: SceneConfig) -> None:
    renderer = SceneRenderer(config, seed=0)
    for seed in range(12):
        scene = draw(config, seed)
        image = Image.open(io.BytesIO(renderer.encode(scene, Random(seed)))).convert("RGB")
        assert image.size == (config.image_size, config.image_size)
        check_pixels(scene, image, config)


def check_pixels(scene: Scene, image: Image.Image, config: SceneConfig) -> None:
    def distance(x: int, y: int, color: str) -> int:
        pixel = image.getpixel((x, y))
        assert isinstance(pixel, tuple)
        return max(abs(a - b) for a, b in zip(pixel, COLORS[color], strict=True))

    for item in scene.objects:
        center = (item.x + item.side // 2, item.y + item.side // 2)
        assert distance(*center, item.color) <= SHADE + 14
        assert all(distance(*center, c) > 30 for c in config.colors if c != item.color)
    used = {item.color for item in scene.objects}
    step = config.image_size // 12
    for x in range(2, config.image_size, step):
        for y in range(2, config.image_size, step):
            if not any(i.x - 2 <= x < i.x + i.side + 2 and i.y - 2 <= y < i.y + i.side + 2 for i in scene.objects):
                assert all(distance(x, y, color) > SHADE + 14 for color in used), "ground looks like no object"


@pytest.mark.parametrize("shape", sorted(OUTLINES))
@pytest.mark.parametrize("side", [28, 56, 196])
def test_masks_touch_all_sides_and_fill_the_middle(shape: str, side: int) -> None:
    mask = draw_mask(OUTLINES[shape], side)
    assert mask.getbbox() == (0, 0, side, side)
    middle = mask.crop((side // 2 - side // 10, side // 2 - side // 10, side // 2 + side // 10, side // 2 + side // 10))
    assert middle.getextrema() == (255, 255)


def test_shapes_differ_as_masks() -> None:
    masks = {shape: draw_mask(OUTLINES[shape], 28).tobytes() for shape in OUTLINES}
    names = sorted(masks)
    for a in names:
        for b in names[names.index(a) + 1 :]:
            different = sum(abs(p - q) > 128 for p, q in zip(masks[a], masks[b], strict=True))
            assert different > 28 * 28 * 0.05, (a, b)


def place_of(item: SceneObject, size: int) -> str:
    """Where an object is, told from its margins rather than from its center."""
    vertical = item.y - (size - item.y - item.side)
    horizontal = item.x - (size - item.x - item.side)
    band = 0.2 * size
    words = ["top" if vertical < 0 else "bottom"] if abs(vertical) >= band - 1e-6 else []
    words += ["left" if horizontal < 0 else "right"] if abs(horizontal) >= band - 1e-6 else []
    return " ".join(words) or "center"


def test_positions_of_the_tiny_grid_are_the_nine_names() -> None:
    small = [SceneObject(y, x, 28, "small", "red", "star") for y in (0, 28, 56) for x in (0, 28, 56)]
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    names = [f"{row} {column}".strip() or "center" for row in rows for column in columns]
    assert [position(item, 84) for item in small] == names
    big = [SceneObject(y, x, 56, "big", "red", "star") for y in (0, 28) for x in (0, 28)]
    assert [position(item, 84) for item in big] == ["top left", "top right", "bottom left", "bottom right"]


@PROFILES
@FEW
@given(seed=SEEDS)
def test_captions_say_everything_in_reading_order_and_spans_fit(config: SceneConfig, seed: int) -> None:
    scene = draw(config, seed)
    caption = describe(scene)
    said = re.findall(r"(?:a|an) (\w+) (\w+) (\w+) at the ([a-z ]+?)(?=,| and |$)", caption.text)
    seen = [(i.size, i.color, i.shape, place_of(i, config.image_size)) for i in scene.objects]
    assert said == seen
    assert [(i.y, i.x) for i in scene.objects] == sorted((i.y, i.x) for i in scene.objects)
    for noun, expression in zip(caption.nouns, caption.expressions, strict=True):
        item = noun.object
        assert caption.text[noun.start : noun.end].split() == ["a", item.size, item.color, item.shape]
        whole = caption.text[expression.start : expression.end]
        assert whole == f"a {item.size} {item.color} {item.shape} at the {place_of(item, config.image_size)}"


def answer(scene: Scene, question: str) -> str:
    """The answer, worked out from the question's words: exactly one object may fit them."""
    words = set(re.findall(r"\w+", question))
    fitting = [i for i in scene.objects if all(v in words for v in (i.color, i.shape) if v in words)]
    fitting = [i for i in fitting if not (words & set(COLORS)) or i.color in words]
    fitting = [i for i in fitting if not (words & set(OUTLINES)) or i.shape in words]
    if question == "How many objects are there?":
        return str(len(scene.objects))
    if question.startswith("Is there"):
        return "yes" if fitting else "no"
    assert len(fitting) == 1, f"{question!r} is ambiguous in {scene.key}"
    item = fitting[0]
    asked = {"What color": item.color, "What shape": item.shape, "What size": item.size}
    return asked.get(" ".join(question.split()[:2])) or place_of(item, scene.image_size)


@PROFILES
@FEW
@given(seed=SEEDS)
def test_questions_have_one_answer_and_it_is_true(config: SceneConfig, seed: int) -> None:
    scene = draw(config, seed)
    questions = ask_several(scene, Random(seed), config)
    assert 1 <= len(questions) <= config.questions_per_image
    assert len({q.text for q in questions}) == len(questions)
    for question in questions:
        assert answer(scene, question.text) == question.answer, question


@PROFILES
def test_no_answer_is_frequent_and_knowing_only_the_question_helps_little(config: SceneConfig) -> None:
    rng = Random(3)
    train = [q for s in draw_many(config, 2000, 4) for q in ask_several(s, rng, config)]
    heldout = [q for s in draw_many(config, 600, 5, "heldout") for q in ask_several(s, rng, config)]
    answers = Counter(question.answer for question in heldout)
    assert answers.most_common(1)[0][1] / len(heldout) < 0.25
    guesses: dict[str, Counter[str]] = {}
    for question in train:
        guesses.setdefault(question.text, Counter())[question.answer] += 1
    right = sum(q.text in guesses and guesses[q.text].most_common(1)[0][0] == q.answer for q in heldout)
    assert right / len(heldout) < 0.35, "the best guess of a blind model that has seen the training data"


@PROFILES
@FEW
@given(seed=SEEDS)
def test_dialogues_are_true(config: SceneConfig, seed: int) -> None:
    scene = draw(config, seed)
    turns = converse(scene, "images/7.jpg", Random(seed))
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert 2 <= len(turns) <= 6
    assert turns[0].text.startswith("Picture 1: <img>images/7.jpg</img>\n")
    assert sum(turn.text.count("<img>") for turn in turns) == 1
    boxes = {box_text(item, config.image_size): item for item in scene.objects}
    for question, reply in zip(turns[::2], turns[1::2], strict=True):
        box = re.search(r"<box>(.*)</box>", question.text + reply.text)
        if box is not None:
            item = boxes[box.group(1)]
            assert f"{item.color} {item.shape}" in reply.text
        elif "Where" in question.text:
            name = re.findall(r"the (\w+) (\w+)\?", question.text)[0]
            (item,) = [i for i in scene.objects if (i.color, i.shape) == name]
            assert reply.text == f"at the {place_of(item, config.image_size)}"
        elif "How many" in question.text:
            assert reply.text == str(len(scene.objects))
        else:
            assert reply.text == describe(scene).text


@FEW
@given(seed=SEEDS)
def test_text_documents_only_say_what_the_scene_holds(seed: int) -> None:
    scene = draw(TINY.scene, seed)
    text = document(scene, [WORDS[0]], Random(seed), TINY.scene)
    words = set(re.findall(r"[a-z]+", text)) - set(re.findall(r"[A-Z][^?]*\?", text))
    facts = text.split(" What ")[0]
    colors = {color for color in TINY.scene.colors if re.search(rf"\b{color}\b", facts)}
    assert colors <= {item.color for item in scene.objects}
    for shape in TINY.scene.shapes:
        assert shape not in words or shape in {item.shape for item in scene.objects}


def test_impossible_configurations_are_refused() -> None:
    crowded = dataclasses.replace(TINY.scene, object_weights=(0.0,) * 9 + (1.0,))
    with pytest.raises(ConfigError, match="no scene fits after"):
        draw(crowded, 0)
    with pytest.raises(ConfigError, match="scene.colors: 'teal' cannot be drawn; known are red"):
        SceneRenderer(dataclasses.replace(TINY.scene, colors=("red", "teal")), seed=0)
