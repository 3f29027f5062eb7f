"""What all tests share: ranks, a small data set, a free port, and a folder for what is left behind.

Each of these belongs to one process of pytest. ``tests/run.sh`` starts two; ``helpers/scheduler.py`` says which tests
each of them runs.
"""

from __future__ import annotations

import multiprocessing.util
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.ports import free_port
from tests.helpers.ranks import RankPools

if TYPE_CHECKING:
    from tests.helpers.scheduler import RanksTogether


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RanksTogether | None:
    """Deal the tests out as ``tests/run.sh`` asks for; other ways of pytest-xdist remain what they are."""
    if config.getoption("dist") != "loadscope":
        return None
    from tests.helpers.scheduler import RanksTogether

    return RanksTogether(config, log)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for the temporary files of all processes, which goes with them.

    Ranks that are killed, and torchrun however it ends, do not remove theirs. Its path is short: the name of a socket
    has at most 107 bytes.
    """
    tmp_path_factory.getbasetemp()  # what pytest keeps for three sessions lies elsewhere
    multiprocessing.util.get_temp_dir()  # and so does the folder of this process, which it removes at its end
    made = tempfile.TemporaryDirectory(prefix="tests_", ignore_cleanup_errors=True)
    with made as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(world_size).run(function, *args)``; processes start when first asked for."""
    pools = RankPools()
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data set of ``tests/helpers/prepared.py``, for tests that only read it."""
    from tests.helpers.prepared import prepare_tiny  # imports torch

    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture
def unused_port() -> int:
    """A port for processes that a test starts."""
    return free_port()
