"""Choose the rows of a page: consecutive rows or a random choice, optionally of one source or task."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from megatron_vl.config.suggestions import suggestion
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.errors import ConfigError


@dataclass(frozen=True)
class RowChoice:
    """The requested rows."""

    num_rows: int = 50
    first: int = 0
    """The first row that may be shown, without ``seed``."""
    seed: int | None = None
    """Choose at random, always the same rows for the same seed."""
    source: str | None = None
    task: str | None = None
    """Only rows with a segment of this source and this task."""

    @property
    def described(self) -> str:
        """How the rows were chosen, for a reader."""
        of = [f"{name} {value}" for name, value in (("source", self.source), ("task", self.task)) if value]
        how = f"from row {self.first} on" if self.seed is None else f"chosen at random with seed {self.seed}"
        return f"{how}{', with a sample of ' + ' and '.join(of) if of else ''}"


def choose_rows(store: RowStore, choice: RowChoice) -> list[int]:
    """Return the rows to show, in the order of the data set; fewer than requested if there are no more.

    Raises:
        ConfigError: for a source or task that the data set does not have, and for rows beyond its end.
    """
    counts = store.manifest.counts
    _check_name("source", choice.source, {entry.source for entry in counts}, store.prefix)
    _check_name("task", choice.task, {entry.task for entry in counts}, store.prefix)
    if not 0 <= choice.first < max(len(store), 1):
        raise ConfigError(f"--first {choice.first}: {store.prefix} has rows 0 to {len(store) - 1}.")
    if choice.seed is None:
        order = np.arange(choice.first, len(store))
    else:
        order = np.random.default_rng(choice.seed).permutation(len(store))
    if choice.source is None and choice.task is None:
        return sorted(order[: choice.num_rows].tolist())
    found: list[int] = []
    for index in order:
        if len(found) == choice.num_rows:
            break
        if any(
            choice.source in (None, key.source) and choice.task in (None, key.task) for key in store.keys(int(index))
        ):
            found.append(int(index))
    return sorted(found)


def _check_name(kind: str, name: str | None, known: Collection[str], prefix: str) -> None:
    if name is None or name in known:
        return
    names = ", ".join(sorted(known))
    raise ConfigError(f"--{kind} {name}: {prefix} has no such {kind}, but {names}{suggestion(name, known)}")
