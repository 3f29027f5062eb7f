"""The share of one job in the work of a phase: every n-th item, from its own number on.

The rule depends on nothing but the two numbers, so jobs need not know of each other. Neighboring items, which are
often of one source and of one size, go to different jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_vl.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """Share ``index`` of ``count``, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--num-shards {self.count}: expected at least 1")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"--shard-index {self.index}: expected 0 to {self.count - 1}, as --num-shards says")

    def __str__(self) -> str:
        return f"share {self.index} of {self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of this share, in order."""
        return items[self.index :: self.count]


WHOLE = Share()
"""All work in one job."""
