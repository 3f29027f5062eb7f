"""Steps: commands, what they make, and which steps must come before.

A step comes as the words ``NAME OUTPUT... -- COMMAND [--then COMMAND]... ""``. What it needs is not written down: it
follows from the commands, which name what earlier steps made, and the recipes that they read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

Command = tuple[str, ...]
_OUTPUTS_END, _NEXT_COMMAND, _STEP_END = "--", "--then", ""


@dataclass(frozen=True)
class Step:
    """Commands that belong together, and the files and folders that they make."""

    name: str
    commands: tuple[Command, ...]
    """Command lines; ``python`` and ``torchrun`` mean those of the running interpreter."""
    outputs: tuple[Path, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether the step uses every core."""
        return any(command[0] == "torchrun" for command in self.commands)

    @property
    def resumes(self) -> bool:
        """Whether the commands resume an interrupted attempt, so its outputs stay."""
        return all("--auto-resume" in command for command in self.commands)

    @property
    def recipes(self) -> tuple[Path, ...]:
        """The recipes that the commands name."""
        return tuple(Path(word) for word in self._words() if word.endswith(".yaml"))

    def needs(self, other: Step) -> bool:
        """Return whether a command names what ``other`` makes, or a file in it.

        A prepared data set is made as PREFIX.json and named as PREFIX.
        """
        made = set(other.outputs) | {path.with_suffix("") for path in other.outputs if path.suffix == ".json"}
        named = {place for word in self._words() for place in (Path(word), *Path(word).parents)}
        return not made.isdisjoint(named)

    def _words(self) -> Iterator[str]:
        return (word for command in self.commands for word in command)


def read_steps(words: Iterable[str]) -> list[Step]:
    """Read the words of all steps."""
    return [_read_step(list(group)) for is_end, group in groupby(words, key=_STEP_END.__eq__) if not is_end]


def _read_step(words: list[str]) -> Step:
    end = words.index(_OUTPUTS_END)
    commands = [tuple(group) for is_then, group in groupby(words[end + 1 :], key=_NEXT_COMMAND.__eq__) if not is_then]
    return Step(words[0], tuple(commands), tuple(map(Path, words[1:end])))
