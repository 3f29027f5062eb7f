"""Which of two processes of pytest runs which tests, where ``tests/run.sh`` starts two.

All tests with ranks go to the same one: a second set of ranks for each world size would take seconds to start and three
gigabytes of memory, and eight ranks would share two cores. The other process takes a file at a time, and so does the
first when it has no more tests with ranks.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

WITH_RANKS = "RankPools"
"""Word in a file whose tests have ranks."""


class RanksTogether(LoadScopeScheduling):
    """Deals out files, and all files with ranks as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return WITH_RANKS if _names_ranks(self.config.rootpath / file) else file


@cache
def _names_ranks(file: Path) -> bool:
    return WITH_RANKS in file.read_text(encoding="utf-8")
