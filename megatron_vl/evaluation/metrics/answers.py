"""Short answers: the normalization of the VQA benchmark, its accuracy over ten annotators, and exact match.

The rules are those of the benchmark's public evaluation (GT-Vision-Lab/VQA), quirks included, because published figures
depend on them. There are two deliberate differences. An annotator is left out of the vote by position, not by comparing
records (which loses identical annotators). Both sides are always strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The original passes a flag to re.sub in the place of its count; 32 is the value of that flag."""

_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

_CONTRACTED_WORDS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
y'all'd've you'd've 'ow's'at
"""


def _misspellings(word: str) -> list[str]:
    """Return every spelling of ``word`` that lacks exactly one of its apostrophes."""
    places = [i for i, letter in enumerate(word) if letter == "'"]
    return [word[:i] + word[i + 1 :] for i in places]


_CONTRACTIONS = {spelling: word for word in _CONTRACTED_WORDS.split() for spelling in _misspellings(word)} | {
    "somebody'd": "somebodyd"
}


def _strip_punctuation(text: str) -> str:
    """Delete or blank out punctuation; which of the two depends on the whole text, as in the benchmark."""
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_comma_in_number else " ")
    return _LONE_PERIOD.sub("", result, count=_MAX_PERIODS)


def normalize_answer(text: str) -> str:
    """Return an answer as the VQA benchmark compares it: no punctuation, articles or number words; lower case."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals a reference after :func:`normalize_answer`, else 0.0.

    Normalization may leave nothing of an answer: it removes the letter A, for example, as an article. Then only the
    part that it removes last is kept. Otherwise an empty prediction would be right.
    """
    answer = _something_of(prediction)
    return float(any(answer == _something_of(reference) for reference in references))


def _something_of(text: str) -> str:
    words = text.lower().split()
    return normalize_answer(text) or " ".join(_strip_punctuation(" ".join(words)).split()) or " ".join(words)


def vqa_accuracy(prediction: str, annotators: Sequence[str]) -> float:
    """Return the VQA benchmark's soft accuracy: the mean over annotators of min(1, matching others / 3).

    Answers are normalized only where the annotators disagree, as in the benchmark.

    Raises:
        ValueError: if there are fewer than two annotators, since each is judged by the others.
    """
    if len(annotators) < 2:
        raise ValueError(f"VQA accuracy needs at least two annotators' answers, got {len(annotators)}")
    clean = [_collapse(answer) for answer in annotators]
    answer = _collapse(prediction)
    if len(set(clean)) > 1:
        clean = [normalize_answer(reference) for reference in clean]
        answer = normalize_answer(answer)
    matches = [reference == answer for reference in clean]
    num_matches = sum(matches)
    return sum(min(1.0, (num_matches - own) / 3) for own in matches) / len(matches)


def _collapse(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
