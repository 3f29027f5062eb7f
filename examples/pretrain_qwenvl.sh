#!/usr/bin/env bash
# Train a stage of Qwen-VL. This file is valid Bash and valid Python at once, so each of these works:
#
#   torchrun --nproc-per-node 4 examples/pretrain_qwenvl.sh [flags]               (torchrun runs it with Python)
#   torchrun --no-python --nproc-per-node 4 examples/pretrain_qwenvl.sh [flags]   (torchrun executes it)
#   bash examples/pretrain_qwenvl.sh [flags]                                      (starts torchrun itself)
#   srun bash examples/pretrain_qwenvl.sh [flags]        (one task per node, or one task per GPU)
#   mpirun bash examples/pretrain_qwenvl.sh [flags]      (the same)
#
#   STAGE=1|2|3    examples/qwen_vl/{stage1_pretrain,stage2_multitask,stage3_sft}.yaml; 1 by default
#   RECIPE=FILE    any other recipe
#   flags          override the recipe (tools/train.py --help lists them)
#
# Started with bash: GPUS_PER_NODE (by default all that nvidia-smi lists, or 1 process without a GPU), and for several
# nodes NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, which Slurm's or MPI's own variables fill in where they can.
#
# For Bash the next line is the command ":" and Python's part a here-document that ends at "pass"; for Python, Bash's
# part is a string.
''':'
set -euo pipefail
root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
script="$root/examples/pretrain_qwenvl.sh"
if [[ -n "${VIRTUAL_ENV:-}" ]]; then python=python
elif [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"
else python=python3
fi

first_slurm_host() { scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1; }
need() { if [[ -z "${!1:-}" ]]; then echo "error: $1 is not set: $2" >&2; exit 2; fi; }
number() {  # NAME LEAST MOST
    if [[ "${!1}" =~ ^[0-9]{1,9}$ ]] && ((10#${!1} >= $2 && 10#${!1} <= $3)); then return; fi
    echo "error: $1 is '${!1}': expected a whole number from $2 to $3; export another one, or unset it" >&2
    exit 2
}

# What one process can answer, and a process that a launcher has started as a rank.
case " $* " in *" --dry-run "* | *" --check "* | *" --help "* | *" -h "*) exec "$python" "$script" "$@" ;; esac
if [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" ]]; then exec "$python" "$script" "$@"; fi

# Nodes, this node, and whether the launcher has started one task per node or one per rank.
nodes=1 node=0 tasks_here=1 master=""
if [[ -n "${SLURM_STEP_NUM_TASKS:-}" ]]; then
    nodes="$SLURM_STEP_NUM_NODES" node="$SLURM_NODEID" tasks_here="$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))"
    if ((nodes > 1)) && [[ -z "${MASTER_ADDR:-}" ]]; then master="$(first_slurm_host)"; fi
    port="$((20000 + ${SLURM_JOB_ID:-0} % 10000))"
elif [[ -n "${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}" ]]; then
    size="${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}"
    tasks_here="${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-1}}"
    nodes="$((size / tasks_here))" node="$((${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}} / tasks_here))"
fi
NNODES="${NNODES:-$nodes}" NODE_RANK="${NODE_RANK:-$node}"
number NNODES 1 100000
number NODE_RANK 0 "$((NNODES - 1))"
if [[ -n "${MASTER_PORT:-}" ]]; then number MASTER_PORT 1 65535; fi
if ((NNODES == 1)); then master=127.0.0.1; fi
MASTER_ADDR="${MASTER_ADDR:-$master}"
need MASTER_ADDR "export the name of the first of the $NNODES nodes"
if ((tasks_here > 1)); then
    export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-${port:-29500}}"
    exec "$python" "$script" "$@"
fi

if [[ -z "${GPUS_PER_NODE:-}" ]]; then
    GPUS_PER_NODE="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
    GPUS_PER_NODE="$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))"
fi
number GPUS_PER_NODE 1 1000
meet=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR")
meet+=(--master-port "${MASTER_PORT:-${port:-29500}}")
if ((NNODES == 1)) && [[ -z "${MASTER_PORT:-}" ]]; then meet=(--standalone); fi
if ((NODE_RANK == 0)) && [[ -n "${MASTER_PORT:-}" ]] && (: <>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
    echo "error: MASTER_PORT is $MASTER_PORT, where something on this machine listens already: export another one" >&2
    exit 2
fi
"$python" "$script" "$@" --check --world-size "$((NNODES * GPUS_PER_NODE))"
exec "$python" "$root/tools/torchrun.py" "${meet[@]}" --nproc-per-node "$GPUS_PER_NODE" "$script" "$@"
: <<'pass'
'''
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_vl.cli.train import main

STAGES = {"1": "stage1_pretrain", "2": "stage2_multitask", "3": "stage3_sft"}


def recipe() -> str:
    stage = os.environ.get("STAGE", "1")
    if "RECIPE" not in os.environ and stage not in STAGES:
        sys.exit(f"error: STAGE is {stage!r}; expected 1, 2 or 3 (or RECIPE=FILE for another recipe)")
    return os.environ.get("RECIPE") or str(ROOT / "examples" / "qwen_vl" / f"{STAGES[stage]}.yaml")


if __name__ == "__main__":
    sys.exit(main([recipe(), *sys.argv[1:]]))
pass
