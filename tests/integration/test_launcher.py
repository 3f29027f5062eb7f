"""examples/pretrain_qwenvl.sh, started in each way that its header names.

What the ranks are given is seen by a stand-in for the train command in a copy of the checkout, so no test here trains;
what they refuse is seen with the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import PIPE

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/pretrain_qwenvl.sh"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

STAND_IN = """
import json, os, sys
from pathlib import Path
from subprocess import PIPE

def main(argv):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    seen = {"argv": argv} | {name: os.environ[name] for name in names if name in os.environ}
    Path(os.environ["SEEN"], str(os.getpid())).write_text(json.dumps(seen))
    return 2 if "--refuse" in argv else 0
"""

TORCHRUN_STAND_IN = """
import json, os, sys
from pathlib import Path

Path(os.environ["SEEN"], "torchrun").write_text(json.dumps({"argv": sys.argv[1:]}))
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def environment(**changes: str) -> dict[str, str]:
    """The environment without what a launcher may have left in it, and with this interpreter first."""
    prefixes = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "TORCHELASTIC_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "STAGE", "RECIPE"}
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith(prefixes)}
    folder = str(Path(sys.executable).parent)
    kept |= {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | changes


def run(command: list[str], folder: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=dict(env), capture_output=True, text=True, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script and the stand-in."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    command = tmp_path / "megatron_vl" / "cli"
    command.mkdir(parents=True)
    (command / "train.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "tools").mkdir()
    parts = ("errors", "launch", "log", "cli/start", "cli/torchrun")
    for name in ("tools/torchrun", *(f"megatron_vl/{part}" for part in parts)):
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"{name}.py")
    (tmp_path / "seen").mkdir()
    return tmp_path


def ranks_seen(checkout: Path, *, check: bool = False) -> list[dict[str, str | list[str]]]:
    """What each rank of the run (or each call of --check) was given, by rank."""
    paths = [path for path in (checkout / "seen").iterdir() if path.name != "torchrun"]
    seen = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    chosen = [item for item in seen if ("--check" in item["argv"]) == check]
    return sorted(chosen, key=lambda item: int(item.get("RANK", 0)))


def start(checkout: Path, command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return run(command, checkout, environment(SEEN=str(checkout / "seen"), PYTHONPATH="", **changes))


def test_valid_bash_and_valid_python() -> None:
    done = run(["bash", "-n", SCRIPT], ROOT, environment())
    assert done.returncode == 0 and not done.stderr
    compile((ROOT / SCRIPT).read_text(encoding="utf-8"), SCRIPT, "exec")
    assert os.access(ROOT / SCRIPT, os.X_OK)
    for script in [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"]:
        assert run(["bash", "-n", str(script)], ROOT, environment()).returncode == 0, script


@pytest.mark.parametrize("form", [[], ["--no-python"]])
def test_torchrun(checkout: Path, form: list[str]) -> None:
    done = start(checkout, [*TORCHRUN, *form, "--nproc-per-node", "2", SCRIPT, "--train-iters", "5"], STAGE="2")
    assert done.returncode == 0, done.stderr
    ranks = ranks_seen(checkout)
    assert [(item["RANK"], item["WORLD_SIZE"]) for item in ranks] == [("0", "2"), ("1", "2")]
    recipe = str(checkout / "examples" / "qwen_vl" / "stage2_multitask.yaml")
    assert all(item["argv"] == [recipe, "--train-iters", "5"] for item in ranks)


@pytest.fixture
def torchrun_arguments(checkout: Path) -> Callable[[], list[str]]:
    """Put a stand-in for torchrun in its place; return what it was given."""
    (checkout / "tools" / "torchrun.py").write_text(TORCHRUN_STAND_IN, encoding="utf-8")
    return lambda: list(json.loads((checkout / "seen" / "torchrun").read_text(encoding="utf-8"))["argv"])


def test_bash_checks_and_starts_torchrun(checkout: Path, torchrun_arguments: Callable[[], list[str]]) -> None:
    done = start(checkout, ["bash", SCRIPT, "--lr", "1"], GPUS_PER_NODE="2", RECIPE="my.yaml")
    assert done.returncode == 0, done.stderr
    (check,) = ranks_seen(checkout, check=True)
    assert check["argv"] == ["my.yaml", "--lr", "1", "--check", "--world-size", "2"]
    script = str(checkout / SCRIPT)
    assert torchrun_arguments() == ["--standalone", "--nproc-per-node", "2", script, "--lr", "1"]


def test_srun_with_one_task_per_node_starts_torchrun(
    checkout: Path, torchrun_arguments: Callable[[], list[str]]
) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "1", "SLURM_JOB_ID": "12"}
    scontrol = checkout / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('[[ "$*" == "show hostnames node[4-6]" ]] && printf "node4 node5 node6" | tr " " "\\n"')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{environment()['PATH']}"
    slurm |= {"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[4-6]", "PATH": path}
    done = start(checkout, ["bash", SCRIPT], **slurm, GPUS_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    (check,) = ranks_seen(checkout, check=True)
    assert check["argv"][-2:] == ["--world-size", "12"]
    meet = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "node4", "--master-port", "20012"]
    assert torchrun_arguments()[:10] == [*meet, "--nproc-per-node", "4"]


def test_bash_starts_nothing_after_a_refusal(checkout: Path) -> None:
    done = start(checkout, ["bash", SCRIPT, "--refuse"], GPUS_PER_NODE="2")
    assert done.returncode == 2
    assert len(ranks_seen(checkout, check=True)) == 1 and ranks_seen(checkout) == []


def test_two_agents_on_one_machine(checkout: Path, unused_port: int) -> None:
    (checkout / "temporary").mkdir()
    common = {"NNODES": "2", "GPUS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    own = {"SEEN": str(checkout / "seen"), "PYTHONPATH": "", "TMPDIR": str(checkout / "temporary")}
    env = environment(**own, **common)
    agents = [
        subprocess.Popen(["bash", SCRIPT], cwd=checkout, env=env | {"NODE_RANK": node}, stderr=PIPE, text=True)
        for node in ("0", "1")
    ]
    errors = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    ranks = ranks_seen(checkout)
    assert [(item["RANK"], item["WORLD_SIZE"]) for item in ranks] == [(str(rank), "4") for rank in range(4)]
    assert [item["LOCAL_RANK"] for item in ranks] == ["0", "1", "0", "1"]
    assert not list((checkout / "temporary").glob("torchelastic*"))


def test_several_nodes_need_an_address(checkout: Path) -> None:
    done = start(checkout, ["bash", SCRIPT], NNODES="2", NODE_RANK="0")
    assert done.returncode == 2 and "MASTER_ADDR is not set" in done.stderr and ranks_seen(checkout) == []


def test_srun_with_one_task_per_gpu_runs_the_rank_itself(checkout: Path) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    for rank in ("0", "1"):
        done = start(checkout, ["bash", SCRIPT], **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        assert done.returncode == 0, done.stderr
    assert {item["SLURM_PROCID"] for item in ranks_seen(checkout)} == {"0", "1"}
    assert all(item["MASTER_ADDR"] == "127.0.0.1" for item in ranks_seen(checkout))


@pytest.mark.skipif(shutil.which("mpirun", path=environment()["PATH"]) is None, reason="needs mpirun")
def test_mpirun_with_several_tasks_runs_the_ranks_themselves(checkout: Path) -> None:
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = start(checkout, [*mpirun, "bash", SCRIPT])
    assert done.returncode == 0, done.stderr
    assert {item["OMPI_COMM_WORLD_RANK"] for item in ranks_seen(checkout)} == {"0", "1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is '0': expected a whole number from 1 to"),
        ({"NNODES": "x"}, "NNODES is 'x': expected a whole number from 1 to"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2': expected a whole number from 0 to 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': expected a whole number from 1 to 65535"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "said",
)
def test_what_counts_ranks_is_a_number(checkout: Path, changes: dict[str, str], said: str) -> None:
    done = start(checkout, ["bash", SCRIPT], **changes)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert said in done.stderr and ranks_seen(checkout, check=True) == ranks_seen(checkout) == []


def test_a_port_in_use_is_named_before_anything_starts(checkout: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        done = start(checkout, ["bash", SCRIPT], MASTER_PORT=port)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"MASTER_PORT is {port}" in done.stderr and "export another one" in done.stderr


def test_the_script_works_through_a_link(checkout: Path, torchrun_arguments: Callable[[], list[str]]) -> None:
    (checkout / "elsewhere").mkdir()
    link = checkout / "elsewhere" / "train.sh"
    link.symlink_to(checkout / SCRIPT)
    done = start(checkout, ["bash", str(link)], GPUS_PER_NODE="2", RECIPE="my.yaml")
    assert done.returncode == 0, done.stderr
    assert str(checkout / SCRIPT) in torchrun_arguments()


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_one_line(variable: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2"} | {variable: "x"}
    train = ["tools/train.py", "examples/tiny/stage0_text.yaml"]
    for command in (train, ["tools/evaluate_loss.py", "--checkpoint", "none", "--data-path", "none"]):
        done = run([sys.executable, *command], ROOT, environment(**given))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"environment variable {variable} is 'x'" in done.stderr


@pytest.mark.parametrize("stage", ["0", "4", "one"])
def test_unknown_stage(checkout: Path, stage: str) -> None:
    done = start(checkout, ["bash", SCRIPT], STAGE=stage)
    assert done.returncode != 0 and f"STAGE is '{stage}'; expected 1, 2 or 3" in done.stderr


def test_dry_run_needs_no_launcher() -> None:
    done = run(["bash", SCRIPT, "--dry-run", "--pipeline-model-parallel-size", "4"], ROOT, environment(STAGE="3"))
    assert done.returncode == 0, done.stderr
    assert "9,655,886,592 parameters" in done.stdout and "4 x data 1" in done.stdout


def test_without_data_the_tiny_recipe_is_named() -> None:
    for command in (["bash", SCRIPT], [*TORCHRUN, "--nproc-per-node", "2", SCRIPT]):
        done = run(command, ROOT, environment())
        assert done.returncode != 0
        assert done.stderr.count("data.data_path is empty") == 1
        assert "bash examples/quickstart.sh" in done.stderr and "examples/tiny/stage1_pretrain.yaml" in done.stderr
        assert "SIGKILL" not in done.stderr


def test_at_7b_without_cuda_the_tiny_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").touch()
    done = run(["bash", SCRIPT, "--data-path", str(tmp_path / "rows")], ROOT, environment(GPUS_PER_NODE="1"))
    assert done.returncode == 2
    assert "9,655,886,592 parameters and no CUDA" in done.stderr and "bash examples/quickstart.sh" in done.stderr
