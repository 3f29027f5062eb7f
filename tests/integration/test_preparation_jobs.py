"""A preparation in phases, as the scripts for Slurm and Kubernetes start it.

The stand-in for ``sbatch`` runs the tasks at once, in this order, where the jobs that they wait for have ended well.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from tests.helpers.data.jobs import hashes, recipe_file
from tests.helpers.data.prepared import write_raw
from tests.integration.test_kubernetes import FOLDER, objects, script_of
from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "prepare.sbatch.sh"
SBATCH = r"""#!/bin/bash
echo "$@" >> "$FOLDER/sbatch"
job=$(($(cat "$FOLDER/jobs" 2>/dev/null || echo 70) + 1))
echo "$job" > "$FOLDER/jobs"
tasks=none
while [[ "$1" == --* ]]; do
    case "$1" in
        --export=ALL,*) export "${1#--export=ALL,}" ;;
        --array=0-*) tasks=$(seq 0 "${1#--array=0-}") ;;
        --dependency=afterok:*) after="${1#--dependency=afterok:}" ;;
    esac
    shift
done
echo "$job;here"
if [[ -n "${after:-}" && ! -e "$FOLDER/ended.$after" ]]; then exit 0; fi
export SLURM_JOB_ID="$job" SLURM_SUBMIT_DIR="$CHECKOUT" SLURM_CPUS_PER_TASK=1 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1
for task in $tasks; do
    if [[ "$task" != none ]]; then export SLURM_ARRAY_TASK_ID="$task"; fi
    bash "$@" >> "$FOLDER/log" 2>&1 || exit 0
done
touch "$FOLDER/ended.$job"
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path)


def submit(raw: Path) -> subprocess.CompletedProcess[str]:
    stand_in = raw / "bin" / "sbatch"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(SBATCH)
    stand_in.chmod(0o755)
    env = environment(SHARDS="2", FOLDER=str(raw), CHECKOUT=str(ROOT))
    env["PATH"] = f"{stand_in.parent}:{env['PATH']}"
    command = ["bash", str(SCRIPT), str(raw / "data.yaml"), "--output", str(raw / "set")]
    return subprocess.run(command, cwd=raw, env=env, capture_output=True, text=True, timeout=500)


def test_slurm_runs_three_jobs_one_after_another(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw))
    prepare(recipe, raw / "one", progress=False)
    done = submit(raw)
    assert (done.returncode, done.stdout) == (0, "parts: job 71, plan: job 72, rows: job 73\n"), done.stderr
    calls = [line.split(str(SCRIPT))[0].split() for line in (raw / "sbatch").read_text().splitlines()]
    common = ["--parsable", "--kill-on-invalid-dep=yes"]
    assert [sorted(set(call) - set(common)) for call in calls] == [
        ["--array=0-1", "--export=ALL,PHASE=parts"],
        ["--dependency=afterok:71", "--export=ALL,PHASE=plan"],
        ["--array=0-1", "--dependency=afterok:72", "--export=ALL,PHASE=rows"],
    ]
    assert all(set(common) <= set(call) for call in calls)
    log = (raw / "log").read_text()
    assert "share 1 of 2" in log and f"prepared {raw / 'set'}" in log, log
    assert hashes(raw / "set") == hashes(raw / "one")


def test_after_a_failure_nothing_that_waits_is_run(raw: Path) -> None:
    recipe_file(raw, vocab_file="other.tiktoken")
    (raw / "other.tiktoken").touch()
    assert submit(raw).returncode == 0
    assert not list(raw.glob("ended.*")) and not (raw / "set.json").exists()
    assert (raw / "log").read_text().count("error: vocabulary") == 1


def test_the_jobs_of_kubernetes_differ_by_their_phase_alone() -> None:
    jobs = {phase: objects(FOLDER / f"prepare_{phase}.yaml")["Job"] for phase in ("parts", "plan", "rows")}
    scripts = {phase: script_of(FOLDER / f"prepare_{phase}.yaml") for phase in jobs}
    for phase, job in jobs.items():
        assert job["metadata"]["name"] == f"qwen-vl-{phase}" and f"--phase {phase}" in scripts[phase]
        if phase == "plan":
            assert "completions" not in job["spec"] and "--num-shards" not in scripts[phase]
            continue
        assert job["spec"]["completionMode"] == "Indexed"
        (count,) = re.findall(r'--shard-index "\$JOB_COMPLETION_INDEX" --num-shards (\d+)', scripts[phase])
        assert int(count) == job["spec"]["completions"]
    whole = re.sub(r" --workers \S+", "", script_of(FOLDER / "prepare.yaml")).split()
    for phase, script in scripts.items():
        mine = re.sub(rf" --workers \S+| --phase {phase}| \\\n *--shard-index.*", "", script).split()
        assert mine == whole, "the same data set"
