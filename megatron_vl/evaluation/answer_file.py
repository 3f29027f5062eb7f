"""Write predictions as they come, so that a killed run continues where it was.

While a run lasts, its lines are in ``OUTPUT.part``, in the order of the questions. What decides the answers stands
beside them in ``OUTPUT.part.json``: the question file and the checkpoint by their hashes, and every flag that changes a
text. At the end ``OUTPUT.part`` becomes ``OUTPUT``. So ``OUTPUT`` is always whole, and a reader never takes a part of
the answers for all.

A run that finds ``OUTPUT.part`` continues it if everything in ``OUTPUT.part.json`` is the same, and is refused
otherwise. A last line without an end is cut off. Every other line must be the answer to the question at its place.
Another process that writes the same output is refused too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl import folder_lock
from megatron_vl.errors import DataError, FolderInUseError
from megatron_vl.evaluation.json_records import iterate_json_lines, read_json
from megatron_vl.evaluation.questions import Prediction, Question, to_lines
from megatron_vl.files import move, sync, write_whole

_ANSWER = ("prediction", "skipped")
_NAMED = 3
"""Number of skipped questions that a summary names."""


@dataclass
class Tally:
    """What is in the file so far."""

    lines: int = 0
    skipped: int = 0
    named: list[str] = field(default_factory=list)

    def count(self, name: str, skipped: str | None) -> None:
        """Count a line."""
        self.lines += 1
        if skipped is not None:
            self.skipped += 1
            self.named += [f"{name}, {skipped}"] if len(self.named) < _NAMED else []

    @property
    def summary(self) -> str:
        """The counts, for people."""
        said = f"{self.lines - self.skipped} answers"
        if not self.skipped:
            return said
        return f"{said}; skipped {self.skipped} of {self.lines} questions: {'; '.join(self.named)}"


@dataclass(frozen=True)
class AnswerFile:
    """The output of one run, and of the runs that continue it."""

    path: Path
    settings: Mapping[str, Any]
    """What decides the answers: names and values of JSON."""
    restart: bool = False
    """Drop what an earlier run has left."""

    @property
    def part(self) -> Path:
        """The lines so far."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def _settings_path(self) -> Path:
        return self.part.with_name(f"{self.part.name}.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing this output. Raises DataError if one does."""
        try:
            with folder_lock.hold(self.path.parent, f".{self.path.name}.lock"):
                yield
        except FolderInUseError as error:
            raise DataError(f"--output {self.path}: is being written by another run ({error})") from error

    def resume(self, questions: Iterable[Question]) -> Tally:
        """Prepare the file for further lines, and return what is in it.

        Args:
            questions: all of them, from the first; read as far as there are answers.

        Raises:
            DataError: if the lines are of a run with other settings, or are not the answers to the questions.
        """
        tally = Tally()
        if self.restart or not self.part.exists():
            self.part.unlink(missing_ok=True)
            write_whole(self._settings_path, json.dumps(self.settings, indent=1) + "\n", durable=True)
            self.part.touch()
            return tally
        self._check_settings()
        _cut_torn_line(self.part)
        remaining = iter(questions)
        for number, fields in iterate_json_lines(self.part, written_by="tools/generate.py"):
            question = next(remaining, None)
            if question is None or _asked(fields) != json.loads(json.dumps(question.fields)):
                what = "there is no such question" if question is None else f"is not the answer to {question.name}"
                raise DataError(f"{self.part}, line {number}: {what}; {self._remedy}")
            tally.count(question.name, fields.get("skipped"))
        return tally

    def append(self, predictions: Iterable[Prediction], tally: Tally, report: Callable[[], object]) -> None:
        """Write each prediction at once, count it, and call ``report``."""
        with self.part.open("ab") as file:
            for prediction in predictions:
                file.write(to_lines([prediction]).encode("utf-8", "backslashreplace"))
                file.flush()
                tally.count(prediction.name, prediction.skipped)
                report()
            sync(file)

    def finish(self) -> None:
        """Give the lines their final name."""
        move((self.part, self.path))
        self._settings_path.unlink(missing_ok=True)

    @property
    def _remedy(self) -> str:
        return f"repeat the command that wrote it, give another --output, or --restart to drop {self.part.name}"

    def _check_settings(self) -> None:
        if not self._settings_path.exists():
            raise DataError(
                f"{self.part}: {self._settings_path.name}, which says what wrote it, is missing; {self._remedy}"
            )
        before = read_json(self._settings_path, written_by="tools/generate.py")
        names = dict.fromkeys([*before, *self.settings]) if isinstance(before, dict) else {}
        changed = [
            f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}"
            for name in names
            if before.get(name) != self.settings.get(name)
        ]
        if changed or not names:
            raise DataError(
                f"{self.part} is of another run: {'; '.join(changed) or 'nothing is said of it'}; {self._remedy}"
            )


def _asked(fields: Any) -> Any:
    """Return a line of predictions without the answer."""
    if not isinstance(fields, dict) or "prediction" not in fields:
        return None
    return {name: value for name, value in fields.items() if name not in _ANSWER}


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        end = size
        while end > 0:
            start = max(0, end - 2**16)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        file.truncate(end)
