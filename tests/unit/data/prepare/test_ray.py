"""``--engine ray``, with a stand-in of Ray's interface, and with a cluster of one machine where Ray is installed.

The stand-in is what is used of Ray: ``init``, ``remote``, ``future`` of a reference, ``cluster_resources``,
``shutdown`` and two exceptions. Like Ray, it pickles what it is given and what it gives back.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vl.cli.prepare import main
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.workers import open_pool
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.jobs import ROOT, hashes, recipe_file

THREADS = 3
CLUSTER = """
import os, ray, subprocess, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], env=environment))
"""


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a traceback\n{cause}")
        self.cause = cause


class StandIn:
    """What is used of the module ``ray``."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.threads = ThreadPoolExecutor(THREADS)
        self.settings: dict[str, Any] = {}
        self.num_tasks = 0
        self.is_lost = False

    def init(self, **settings: Any) -> None:
        self.settings = settings

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(THREADS), "memory": 1e9}

    def shutdown(self) -> None:
        self.settings = {}

    def remote(self, function: Callable[..., Any]) -> SimpleNamespace:
        def start(*arguments: Any) -> SimpleNamespace:
            self.num_tasks += 1
            future = self.threads.submit(self._work, ForkingPickler.dumps((function, arguments)))
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=start)

    def _work(self, task: bytes) -> Any:
        if self.is_lost:
            raise RayError("The node died.\nMore of it.")
        function, arguments = ForkingPickler.loads(task)
        try:
            return ForkingPickler.loads(ForkingPickler.dumps(function(*arguments)))
        except Exception as error:
            raise RayTaskError(ForkingPickler.loads(ForkingPickler.dumps(error))) from error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "ray", module)
    yield module
    module.threads.shutdown()


@pytest.mark.usefixtures("small_slices")
def test_ray_gives_the_same_bytes(raw: Path, ray: StandIn) -> None:
    recipe = load_recipe(recipe_file(raw))
    prepare(recipe, raw / "one", progress=False)
    with open_pool(engine="ray") as pool:
        assert pool is not None and pool.size == THREADS
        assert ray.settings["address"] == "auto", "a cluster that runs, none of its own"
        assert ray.settings["runtime_env"] == {"env_vars": {"PYTHONPATH": str(ROOT)}}
        prepare(recipe, raw / "set", pool=pool, progress=False)
    assert ray.num_tasks > 16, "parts and slices"
    assert not ray.settings, "it is left"
    assert hashes(raw / "set") == hashes(raw / "one")


def test_the_command_uses_it(raw: Path, ray: StandIn) -> None:
    assert main([str(recipe_file(raw)), "--output", str(raw / "set"), "--quiet", "--engine", "ray"]) == 0
    assert ray.num_tasks == 17, "16 parts and one slice"
    ray.num_tasks = 0
    flags = [str(raw / "data.yaml"), "--output", str(raw / "phases"), "--quiet", "--engine", "ray", "--phase"]
    assert [main([*flags, phase]) for phase in ("parts", "plan", "rows")] == [0, 0, 0]
    assert ray.num_tasks == 17 and hashes(raw / "phases") == hashes(raw / "set")


def test_an_error_of_a_task_is_that_of_its_work(raw: Path, ray: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "other.tiktoken").touch()
    recipe = recipe_file(raw, vocab_file="other.tiktoken")
    assert main([str(recipe), "--output", str(raw / "set"), "--quiet", "--engine", "ray"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: vocabulary") and "traceback" not in told


def test_a_worker_that_is_lost_is_named(raw: Path, ray: StandIn) -> None:
    recipe = load_recipe(recipe_file(raw))
    ray.is_lost = True
    with (
        pytest.raises(DataError, match=r"Ray lost a worker \(The node died\.\); start again: it goes on"),
        open_pool(engine="ray") as pool,
    ):
        prepare(recipe, raw / "set", pool=pool, progress=False)
    assert not ray.settings, "it is left"


def test_what_ray_needs_is_said(monkeypatch: pytest.MonkeyPatch, ray: StandIn) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"no Ray cluster runs here\. Start one"):
        patch.setattr(ray, "init", refuse)
        open_pool(engine="ray").__enter__()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="4 processes were started, but one hands"):
        patch.setenv("OMPI_COMM_WORLD_RANK", "0")
        patch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        open_pool(engine="ray").__enter__()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"not installed here \(pip install ray\)"):
        patch.setitem(sys.modules, "ray", None)
        open_pool(engine="ray").__enter__()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_real_cluster_of_one_machine_gives_the_same_bytes(raw: Path) -> None:
    recipe = recipe_file(raw)
    prepare(load_recipe(recipe), raw / "one", progress=False)
    done = on_a_cluster(str(recipe), "--output", str(raw / "set"))
    assert done.returncode == 0, done.stderr
    assert hashes(raw / "set") == hashes(raw / "one")
    (raw / "other.tiktoken").touch()
    refused = on_a_cluster(str(recipe_file(raw, vocab_file="other.tiktoken")), "--output", str(raw / "set"))
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: vocabulary"), refused.stderr


def on_a_cluster(*flags: str) -> subprocess.CompletedProcess[str]:
    """Start a cluster, and the command in another process."""
    command = [sys.executable, "-c", CLUSTER, "tools/prepare_data.py", *flags, "--quiet", "--engine", "ray"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
