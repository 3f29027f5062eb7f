"""Ranks that live as long as the test session, one set for each world size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(world_size).run(function, *args)``; processes start when first asked for."""
    pools = RankPools()
    yield pools
    pools.stop()
