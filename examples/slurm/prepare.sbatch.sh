#!/usr/bin/env bash
# A preparation in phases (docs/data.md), on any number of nodes that Slurm finds for it. Started with bash, this script
# submits three jobs of itself, each of which waits for the one before. They are an array that makes the parts, one job
# that plans, and an array that writes the rows and completes the data set.
#
#   SHARDS=64 bash examples/slurm/prepare.sbatch.sh RECIPE --output PREFIX [flags of tools/prepare_data.py]
#
# If a task fails or reaches its time limit, the jobs that wait for it leave the queue (afterok, --kill-on-invalid-dep).
# Start the script again with the same flags: what is finished is not made again. After a failure of a node, Slurm itself
# puts the task back into the queue (--requeue). A task of the last array that is run again completes the data set, or
# says that it is complete.
#
# Options of sbatch for all three jobs, such as the partition, are given as variables, such as SBATCH_PARTITION
# (sbatch(1)). Each task uses all cores that it gets. The one that plans needs one core, and memory for the numbers of all
# samples.
#SBATCH --job-name=qwen-vl-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail
: "${SHARDS:?number of tasks of each array}"

if [[ -n "${PHASE:-}" ]]; then # in a job
    share=()
    if [[ "$PHASE" != plan ]]; then share=(--shard-index "$SLURM_ARRAY_TASK_ID" --num-shards "$SHARDS"); fi
    cd "$SLURM_SUBMIT_DIR"
    exec python tools/prepare_data.py "$@" --phase "$PHASE" "${share[@]}" --workers "$SLURM_CPUS_PER_TASK" --quiet
fi

submit() { # PHASE AFTER [flags of sbatch]
    local phase="$1" after="$2"
    shift 2
    sbatch --parsable --export="ALL,PHASE=$phase" --kill-on-invalid-dep=yes ${after:+--dependency="afterok:$after"} "$@"
}
command=("$0" "$@")
array="--array=0-$((SHARDS - 1))"
parts="$(submit parts "" "$array" "${command[@]}")"
plan="$(submit plan "${parts%%;*}" "${command[@]}")" # on some clusters the number is followed by ;CLUSTER
rows="$(submit rows "${plan%%;*}" "$array" "${command[@]}")"
echo "parts: job ${parts%%;*}, plan: job ${plan%%;*}, rows: job ${rows%%;*}"
