"""The jobs for Kubernetes: their parts name each other, their commands are taken, and torchrun's agents meet again."""

from __future__ import annotations

import re
import subprocess
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
FROM_KUBERNETES = {"JOB_COMPLETION_INDEX"}
"""What an indexed job sets in its pods."""
RANK = """
import os, sys, time
from pathlib import Path
folder = Path(os.environ["SEEN"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(folder / f"{attempt}.{os.environ['RANK']}").write_text(" ".join(sys.argv[1:]))
while len(list(folder.glob(f"{attempt}.*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.05)
sys.exit(75 if attempt == 0 else 0)  # all ranks of a run stop at the same step
"""


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
    assert [path.name for path in FILES] == ["prepare.yaml", "train.yaml"]


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
    (prepare,) = [
        rule for rule in objects(FOLDER / "prepare.yaml")["Job"]["spec"]["podFailurePolicy"]["rules"]
        if rule["action"] == "FailJob"
    ]  # fmt: skip
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


def test_the_preparation_takes_its_flags(tmp_path: Path) -> None:
    """Up to the answer that no data set is there."""
    variables = {"RAW": str(tmp_path), "DATA": str(tmp_path / "rows"), "CORES": "1"}
    done = subprocess.run(
        ["bash", "-ec", script_of(FOLDER / "prepare.yaml")],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "the files of all sources are missing" in done.stderr + done.stdout, done.stderr


def test_two_pods_meet_and_after_a_stop_meet_again(tmp_path: Path, unused_port: int) -> None:
    """The real agents of torchrun with the flags of the job, for two pods of one rank each."""
    rank, seen = tmp_path / "rank.py", tmp_path / "seen"
    rank.write_text(RANK, encoding="utf-8")
    seen.mkdir()
    script = script_of(FOLDER / "train.yaml")
    for old, new in (
        ("--nnodes 4 --nproc-per-node 8", "--nnodes 2 --nproc-per-node 1"),
        ("qwen-vl-0.qwen-vl:29400", f"127.0.0.1:{unused_port}"),
        ("examples/pretrain_qwenvl.sh", str(rank)),
    ):
        assert old in script
        script = script.replace(old, new)
    variables = {"POD_IP": "127.0.0.1", "DATA": "data", "FROM": "before", "RUN": "run", "SEEN": str(seen)}
    pods = [
        subprocess.Popen(
            ["bash", "-ec", script], cwd=ROOT, env=environment(JOB_COMPLETION_INDEX=index, **variables),
            stderr=subprocess.PIPE, text=True,
        )
        for index in ("1", "0")
    ]  # fmt: skip
    try:
        errors = [pod.communicate(timeout=280)[1] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], errors
    assert {path.name for path in seen.iterdir()} == {"0.0", "0.1", "1.0", "1.1"}
    flags = "--data-path data --pretrained-checkpoint before --save run --auto-resume --save-interval 500"
    assert {path.read_text() for path in seen.iterdir()} == {flags}


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
