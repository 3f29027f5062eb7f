"""The filters of a source, applied to one sample. The result depends only on the sample.

A rule checks the sample and returns what is wrong with it, or nothing. The first rule that finds something drops the
sample under its reason. Cheap rules come first, then cleaning, then the rules about the cleaned text. The rules about
images run where images are decoded anyway.

The phrases of a grounded caption are located by character positions, so its text is never changed. If cleaning would
change it, the sample is dropped. The lines of a page are shown in its picture, so they are never changed either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.filters.text import (
    first_emoji,
    first_special_tag,
    foreign_letters,
    has_chinese,
    strip_html,
    strip_irregular,
)
from megatron_vl.data.sample import IMAGE_MARK, Sample
from megatron_vl.errors import DataError, SkipSample


@dataclass(frozen=True)
class Rule:
    """A rule and the reason under which it drops samples."""

    reason: str
    check: Callable[[Sample], str | None]
    """Function that returns what is wrong with a sample, or None."""


class SampleFilter:
    """The rules of one source."""

    def __init__(self, options: FilterOptions) -> None:
        self._options = options
        self._first = _first_rules(options)
        self._cleaners = _cleaners(options)
        self._last = _last_rules(options)

    def apply(self, sample: Sample) -> Sample:
        """Return the sample with its text cleaned. Raises SkipSample with the reason if it is dropped."""
        _judge(sample, self._first)
        sample = self._clean(sample)
        _judge(sample, self._last)
        return sample

    def check_image(self, size: tuple[int, int]) -> None:
        """Check width and height in pixels. Raises SkipSample: ``small_image`` or ``aspect_ratio``."""
        short, long = sorted(size)
        if self._options.min_side is not None and short < self._options.min_side:
            raise SkipSample("small_image", f"{size[0]} x {size[1]}, at least {self._options.min_side} are asked for")
        if self._options.max_aspect_ratio is not None and long > self._options.max_aspect_ratio * short:
            raise SkipSample("aspect_ratio", f"{size[0]} x {size[1]}, above {self._options.max_aspect_ratio:g}")

    def _clean(self, sample: Sample) -> Sample:
        if not self._cleaners or not sample.text or sample.task == "ocr":
            return sample
        # A pattern could match the mark of an image as part of a URL, of a comment, or of a run of marks.
        texts = sample.text.split(IMAGE_MARK) if sample.task == "interleaved" else [sample.text]
        text = IMAGE_MARK.join(map(self._clean_text, texts))
        if text == sample.text.strip():
            return sample
        if any(region.span for region in sample.regions):
            raise SkipSample("unclean_text", f"{sample.text:.60}")
        if not text:
            raise SkipSample("empty_text", f"nothing is left of {sample.text!r:.60}")
        return replace(sample, text=text)

    def _clean_text(self, text: str) -> str:
        for cleaner in self._cleaners:
            text = cleaner(text)
        return text


def _judge(sample: Sample, rules: list[Rule]) -> None:
    for rule in rules:
        problem = rule.check(sample)
        if problem is not None:
            raise SkipSample(rule.reason, problem)


def _first_rules(options: FilterOptions) -> list[Rule]:
    rules: list[Rule] = []
    if options.exclude_images is not None:
        excluded = _read_names(options.exclude_images)
        rules.append(Rule("excluded_image", lambda sample: _excluded(sample, excluded)))
    if options.min_score is not None:
        least = options.min_score
        rules.append(Rule("low_score", lambda sample: _low_score(sample, least)))
        if options.drop_unscored:
            rules.append(Rule("no_score", lambda sample: "the metadata has none" if sample.score is None else None))
    if options.drop_special_tags:
        rules.append(Rule("special_tag", lambda s: None if s.task == "chat" else first_special_tag(all_text(s))))
    return rules


def _cleaners(options: FilterOptions) -> list[Callable[[str], str]]:
    cleaners: list[Callable[[str], str]] = []
    if options.strip_html:
        cleaners.append(strip_html)
    if options.remove_patterns:
        pattern = _any_of(options.remove_patterns)
        cleaners.append(lambda text: pattern.sub("", text).strip())
    if options.strip_irregular:
        cleaners.append(strip_irregular)
    return cleaners


def _last_rules(options: FilterOptions) -> list[Rule]:
    rules: list[Rule] = []
    if options.min_characters is not None:
        least = options.min_characters
        rules.append(Rule("short_text", lambda s: None if len(learned_text(s)) >= least else _length(s)))
    if options.max_characters is not None:
        most = options.max_characters
        rules.append(Rule("long_text", lambda s: None if len(learned_text(s)) <= most else _length(s)))
    if options.letters != "any":
        rules.append(Rule("foreign_letters", lambda sample: _foreign(sample, options)))
    if options.match_language:
        rules.append(Rule("other_language", _other_language))
    if options.drop_emoji:
        rules.append(Rule("emoji", lambda sample: first_emoji(all_text(sample))))
    if options.drop_patterns:
        unwanted = _any_of(options.drop_patterns)
        rules.append(Rule("pattern", lambda sample: _match(unwanted.search(all_text(sample)))))
    return rules


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def all_text(sample: Sample) -> str:
    """Return all text of the sample, line by line."""
    parts = [sample.question, sample.text, *(turn.text for turn in sample.turns)]
    if not sample.text:
        parts += [region.text for region in sample.regions]
    return "\n".join(filter(None, parts))


def learned_text(sample: Sample) -> str:
    """Return the text that the length limits apply to: caption, answer or document, or all turns or lines."""
    lines = [turn.text for turn in sample.turns] or [line.text for line in sample.regions]
    return sample.text.replace(IMAGE_MARK, "") or "\n".join(lines)


def _length(sample: Sample) -> str:
    text = learned_text(sample)
    return f"{len(text)} characters: {text:.40}"


def _low_score(sample: Sample, least: float) -> str | None:
    return None if sample.score is None or sample.score >= least else f"{sample.score:.4f}, at least {least:g}"


def _foreign(sample: Sample, options: FilterOptions) -> str | None:
    count = foreign_letters(all_text(sample), options.letters)
    return None if count <= options.max_foreign_letters else f"{count} of {all_text(sample):.40}"


def _other_language(sample: Sample) -> str | None:
    text = all_text(sample)
    return None if has_chinese(text) == (sample.language == "zh") else f"not {sample.language}: {text:.40}"


def _match(found: re.Match[str] | None) -> str | None:
    return None if found is None else f"{found[0]:.40}"


def _excluded(sample: Sample, names: frozenset[str]) -> str | None:
    for image in sample.images:
        path = PurePosixPath(image.key)
        number = re.search(r"\d+$", path.stem)
        stem_number = str(int(number[0])) if number else path.stem
        if not names.isdisjoint((image.key, path.name, path.stem, stem_number)):
            return image.key
    return None


@lru_cache(maxsize=4)
def _read_names(path: Path) -> frozenset[str]:
    """Return the names in a file with one per line; numbers lose leading zeros."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of images, one a line ({error})") from error
    names = {line.strip() for line in lines} - {""}
    return frozenset(str(int(name)) if name.isdecimal() else name for name in names)
