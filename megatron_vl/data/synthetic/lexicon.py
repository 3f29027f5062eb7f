"""Words and sentences for document pages and text, written for this project, in English and Chinese.

``WORDS`` is the closed lexicon of the tiny pages: short, common words, each one or two tokens of Qwen's first ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from megatron_vl.errors import ConfigError

_WORDS = """
time name data file work user type line view code day year list case word page book home life hand game test
play text help car law food city area sum air box bar map top next part plan post read road room show side
size sort step stop talk team term tool unit wait week wind wood zone
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())

PEOPLE = "the teacher,a young doctor,the old sailor,our neighbour,the driver,a student,the mayor,my sister"
ACTS = "opened,closed,painted,found,carried,bought,sold,repaired,measured,described,moved,washed"
THINGS = "the door,a wooden box,the blue car,three books,the long table,a map,the clock,his boat,an old radio"
PLACES = "in the city,near the river,at the station,by the window,on the hill,behind the school,in room 12"
TIMES = "on Monday,in 1987,last week,before noon,at 8:30,after the rain,every year,in the evening"

PEOPLE_ZH = "老师,医生,学生,司机,我的朋友,他们,这位工人,小王"
TIMES_ZH = "昨天,今天早上,去年,下午三点,星期一,晚上"
PLACES_ZH = "在城市里,在学校,在河边,在车站,在山上,在图书馆"
ACTS_ZH = "买了,看见了,打开了,修好了,找到了,介绍了"
THINGS_ZH = "一本书,一张地图,三个箱子,那扇门,一台旧电脑,很多水果"


def sentence(rng: Random, language: Literal["en", "zh"]) -> str:
    """Return a sentence of everyday words."""
    if language == "zh":
        parts = (PEOPLE_ZH, TIMES_ZH, PLACES_ZH, ACTS_ZH, THINGS_ZH)
        return "".join(_pick(rng, words) for words in parts) + "。"
    text = " ".join(_pick(rng, words) for words in (PEOPLE, ACTS, THINGS, PLACES, TIMES))
    return text[0].upper() + text[1:] + "."


def _pick(rng: Random, words: str) -> str:
    """Return one of the expressions that commas separate."""
    return rng.choice(words.split(","))


def paragraph(rng: Random, num_characters: int, language: Literal["en", "zh"]) -> str:
    """Return sentences of at least ``num_characters`` in total."""
    text = ""
    while len(text) < num_characters:
        text += (" " if text and language == "en" else "") + sentence(rng, language)
    return text


@dataclass(frozen=True)
class Corpus:
    """Running text from a file, from a random position on, continuing at the beginning after the end."""

    text: str

    @classmethod
    def read(cls, path: Path, flag: str = "corpus") -> Corpus:
        """Read the words of a UTF-8 text file. Raises ConfigError, which names the ``flag`` that gave the file."""
        try:
            text = " ".join(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{flag} {path}: cannot be read ({error}); give a file of UTF-8 text") from error
        if not text:
            raise ConfigError(f"{flag} {path}: is empty; give a file of UTF-8 text")
        return cls(text)

    def paragraph(self, rng: Random, num_characters: int, language: Literal["en", "zh"]) -> str:
        """Return text of at least ``num_characters``, starting at a word (Chinese: anywhere)."""
        start = rng.randrange(len(self.text))
        if language == "en":
            start = self.text.rfind(" ", 0, start) + 1
        joined = self.text[start:]
        while len(joined) < num_characters:
            joined += (" " if language == "en" else "") + self.text
        end = joined.find(" ", num_characters) if language == "en" else num_characters
        return joined[:end] if end > 0 else joined
