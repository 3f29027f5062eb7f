"""The jobs for Kubernetes: their parts name each other, their commands are taken, and pods meet again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vl.cli.torchrun import _TIME_TO_SAVE_S
from megatron_vl.errors import ExitStatus
from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "k8s"
FILES = sorted(FOLDER.glob("*.yaml"))
PREPARATIONS = [path for path in FILES if path.stem.startswith("prepare")]
PATIENCE_S = 200
FROM_KUBERNETES = {"JOB_COMPLETION_INDEX"}
"""What an indexed job sets in its pods."""
RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import distributed
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
folder = Path(os.environ["SEEN"])
distributed.init_process_group("gloo")
(folder / f"{os.environ['JOB_COMPLETION_INDEX']}.{os.getpid()}").write_text(" ".join(sys.argv[1:]))
asked = torch.zeros(2)
while not asked.any():  # all ranks stop at the same step
    asked = torch.tensor([float(bool(stopped)), float((folder / "last_step").exists())])
    distributed.all_reduce(asked)
    time.sleep(0.05)
sys.exit(75 if asked[0] else 0)
"""
"""Trains until it is told to stop, and fails where another rank is lost, as ranks of a training do."""


def objects(path: Path) -> dict[str, dict[str, Any]]:
    """The objects of a file by their kind."""
    return {item["kind"]: item for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))}


def pod_of(path: Path) -> dict[str, Any]:
    pod: dict[str, Any] = objects(path)["Job"]["spec"]["template"]["spec"]
    return pod


def container_of(path: Path) -> dict[str, Any]:
    (container,) = pod_of(path)["containers"]
    return dict(container)


def script_of(path: Path) -> str:
    shell, flags, script = container_of(path)["command"]
    assert (shell, flags) == ("bash", "-ec")
    return str(script)


def option(name: str) -> str:
    found = re.search(rf'{name} "?([^\s"]+)', script_of(FOLDER / "train.yaml"))
    assert found, name
    return found[1]


def test_there_are_a_training_and_a_preparation() -> None:
    assert [path.stem for path in FILES] == ["prepare", "prepare_parts", "prepare_plan", "prepare_rows", "train"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_used_in_a_pod_is_declared(path: Path) -> None:
    container, pod = container_of(path), pod_of(path)
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    declared = {item["name"]: item.get("value", "") for item in container["env"]}
    own = set(re.findall(r"^\s*(\w+)=", script_of(path), re.MULTILINE)) | {"is_host"}
    used = set(re.findall(r"\$\{?(\w+)", script_of(path))) - own
    assert used <= declared.keys() | FROM_KUBERNETES
    assert set(declared) - used <= {"STAGE"}, "a variable that nothing reads"
    assert all(value.startswith(tuple(mounts)) for value in declared.values() if value.startswith("/"))
    for rule in objects(path)["Job"]["spec"]["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    assert pod["restartPolicy"] == "Never", "a policy for failures needs that"


def test_the_numbers_and_names_of_the_training_agree() -> None:
    job, service = objects(FOLDER / "train.yaml")["Job"], objects(FOLDER / "train.yaml")["Service"]
    spec, container = job["spec"], container_of(FOLDER / "train.yaml")
    name, subdomain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert spec["completionMode"] == "Indexed"
    assert int(option("--nnodes")) == spec["completions"] == spec["parallelism"]
    assert int(option("--nproc-per-node")) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, port = option("--rdzv-endpoint").split(":")
    assert host == f"{name}-0.{subdomain}" and subdomain == service["metadata"]["name"]
    assert [int(port)] == [item["port"] for item in service["spec"]["ports"]]
    assert [int(port)] == [item["containerPort"] for item in container["ports"]]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > _TIME_TO_SAVE_S


def test_statuses_mean_what_they_mean_elsewhere() -> None:
    rules = objects(FOLDER / "train.yaml")["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_action = {
        rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule
    }  # fmt: skip
    assert by_action == {
        "FailJob": {ExitStatus.USER_ERROR, ExitStatus.NOT_FINITE},
        "Ignore": {ExitStatus.STOPPED},
    }
    for path in PREPARATIONS:
        rules = objects(path)["Job"]["spec"]["podFailurePolicy"]["rules"]
        (prepare,) = [rule for rule in rules if rule["action"] == "FailJob"]
        assert prepare["onExitCodes"]["values"] == [ExitStatus.USER_ERROR]


def test_the_trainer_takes_the_flags_of_the_training() -> None:
    container = container_of(FOLDER / "train.yaml")
    flags = script_of(FOLDER / "train.yaml").partition("examples/pretrain_qwenvl.sh")[2]
    world = int(option("--nnodes")) * int(option("--nproc-per-node"))
    variables = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    command = f"bash examples/pretrain_qwenvl.sh {flags.strip()} --dry-run --world-size {world}"
    done = subprocess.run(
        ["bash", "-ec", command], cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"# {world} ranks = tensor 2" in done.stdout and "save: /shared/runs/stage2" in done.stdout


@pytest.mark.parametrize("path", PREPARATIONS, ids=lambda path: path.stem)
def test_the_preparation_takes_its_flags(tmp_path: Path, path: Path) -> None:
    """Up to the answer that no data set is there."""
    variables = {"RAW": str(tmp_path), "DATA": str(tmp_path / "rows"), "CORES": "1", "JOB_COMPLETION_INDEX": "3"}
    done = subprocess.run(
        ["bash", "-ec", script_of(path)],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "the files of all sources are missing" in done.stderr + done.stdout, done.stderr


def pod_script(port: int, **changes: str) -> str:
    """The script of the training for two pods of one rank each on this machine."""
    script = script_of(FOLDER / "train.yaml")
    changed = {
        "--nnodes 4 --nproc-per-node 8": "--nnodes 2 --nproc-per-node 1",
        "qwen-vl-0.qwen-vl": "127.0.0.1",
        "29400": str(port),
    }
    for old, new in (changed | changes).items():
        assert old in script
        script = script.replace(old, new)
    return script


def start(script: str, index: str, **variables: str) -> subprocess.Popen[str]:
    env = environment(
        JOB_COMPLETION_INDEX=index, POD_IP="127.0.0.1", DATA="data", FROM="before", RUN="run", **variables
    )
    return subprocess.Popen(["bash", "-ec", script], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("hit", "number", "own", "others"),
    [
        pytest.param("1", signal.SIGTERM, 75, {75}, marks=pytest.mark.long),
        ("0", signal.SIGTERM, 75, {75, 1}),  # the other agent may lose the place where they meet
        ("1", signal.SIGKILL, -signal.SIGKILL, {1}),
        pytest.param("0", signal.SIGKILL, -signal.SIGKILL, {1}, marks=pytest.mark.long),
    ],
    ids=["drained", "drained-0", "killed", "killed-0"],
)
def test_after_the_end_of_a_pod_all_pods_start_anew(
    hit: str, number: signal.Signals, own: int, others: set[int], tmp_path: Path, unused_port: int
) -> None:
    """With real agents of torchrun. A pod is drained, or its agent and its rank are killed."""
    rank, seen = tmp_path / "rank.py", tmp_path / "seen"
    rank.write_text(RANK, encoding="utf-8")
    seen.mkdir()
    script = pod_script(unused_port, **{"examples/pretrain_qwenvl.sh": str(rank)})
    pods = {index: start(script, index, SEEN=str(seen)) for index in "10"}
    try:
        wait_for(lambda: len(list(seen.glob("*.*"))) == 2, pods)
        pods[hit].send_signal(number)
        if number == signal.SIGKILL:
            (killed,) = seen.glob(f"{hit}.*")
            os.kill(int(killed.suffix[1:]), number)
        errors = {index: pod.communicate(timeout=PATIENCE_S)[1] for index, pod in pods.items()}
        (other,) = pods.keys() - {hit}
        assert pods[hit].returncode == own and pods[other].returncode in others, errors
        pods = {index: start(script, index, SEEN=str(seen)) for index in "10"}
        wait_for(lambda: len(list(seen.glob("*.*"))) == 4, pods)
        (seen / "last_step").touch()
        errors = {index: pod.communicate(timeout=PATIENCE_S)[1] for index, pod in pods.items()}
        assert {pod.returncode for pod in pods.values()} == {0}, errors
    finally:
        for pod in pods.values():
            pod.kill()
    flags = "--data-path data --pretrained-checkpoint before --save run --auto-resume --save-interval 500"
    assert {path.read_text() for path in seen.glob("*.*")} == {flags}


def wait_for(ready: Callable[[], bool], pods: dict[str, subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert all(pod.poll() is None for pod in pods.values()) and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_pod_waits_for_pod_0_and_not_for_ever(unused_port: int) -> None:
    pod = start(pod_script(unused_port, **{"SECONDS > 1800": "SECONDS > 2"}), "1")
    assert "no pod 0" in pod.communicate(timeout=PATIENCE_S)[1] and pod.returncode == 1


def test_a_pod_that_is_drained_while_it_waits_is_no_failure(unused_port: int) -> None:
    pod = start(pod_script(unused_port, **{"sleep 2": "echo waits >&2; sleep 2"}), "1")
    assert pod.stderr is not None and pod.stderr.readline() == "waits\n"
    pod.terminate()
    pod.communicate(timeout=PATIENCE_S)
    assert pod.returncode == ExitStatus.STOPPED


@pytest.mark.parametrize("path", PREPARATIONS, ids=lambda path: path.stem)
def test_a_preparation_is_not_waited_for(path: Path) -> None:
    """Nothing in it handles SIGTERM, and Kubernetes would wait 30 seconds."""
    assert pod_of(path)["terminationGracePeriodSeconds"] <= 5
