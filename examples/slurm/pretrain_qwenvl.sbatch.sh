#!/usr/bin/env bash
# Stage 2 on four nodes of eight GPUs. The job goes on by itself after each time limit, until the stage is done:
#
#   sbatch --export=ALL,STAGE=2,DATA=/data/stage2,FROM=/runs/stage1,RUN=/runs/stage2 examples/slurm/pretrain_qwenvl.sbatch.sh
#
# One task per node starts torchrun there (examples/pretrain_qwenvl.sh reads Slurm's variables).
#
# 15 minutes before the limit, Slurm sends SIGUSR1 to this script (--signal). It has Slurm send SIGTERM to the ranks
# (scancel --signal), which save after their step and end with status 75. srun gets no signal: at SIGTERM it kills all
# tasks (_srun_signal_mgr in Slurm's src/srun/libsrun/srun_job.c). Then the script puts the job back into the queue, and
# --auto-resume goes on from that checkpoint.
#
# How the run has ended is in last_run.json, which it removes when it starts. Of several nodes, srun returns the highest
# status alone, and a signal before any status (srun(1)), so its status counts only where that file is missing:
#
#   0                       the stage is done
#   2, 3, 130               an error of the user, numbers that are not finite, Ctrl-C: it would end the same way again
#   75, 1, above 128        a stop, a bug or a machine: back into the queue, until MAX_RESTARTS (10) attempts in a row
#                           have written no checkpoint
#   SIGTERM to this script  the job is not put back. To end it with a save:   scancel --batch --signal=TERM JOB
#
# If a node fails, Slurm puts the job back itself (--requeue).
#SBATCH --job-name=qwen-vl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
: "${DATA:?prefix of a packed data set}" "${FROM:?checkpoint of the previous stage}" "${RUN:?directory of this run}"
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

notice=""
stop_ranks() {  # NOTICE
    if [[ -z "$notice" ]]; then # at its limit Slurm sends SIGTERM as well, and that does not cancel the job
        notice="$1"
        scancel --signal=TERM "$SLURM_JOB_ID" || true # to the ranks, not to this script (scancel(1), --batch)
    fi
}
trap 'stop_ranks limit' USR1
trap 'stop_ranks cancelled' TERM

newest_checkpoint() { cat "$RUN/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }
mkdir -p "$RUN"
rm -f "$RUN/last_run.json" # what is there at the end is of this attempt
before="$(newest_checkpoint)"
idle=0 # attempts in a row that wrote no checkpoint
if ((${SLURM_RESTART_COUNT:-0} > 0)); then idle="$(cat "$RUN/idle_attempts" 2>/dev/null || echo 0)"; fi

srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/examples/pretrain_qwenvl.sh" \
    --data-path "$DATA" --pretrained-checkpoint "$FROM" --save "$RUN" --auto-resume --save-interval 500 "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends the wait, not the step
trap '' USR1 TERM # nor the wait for the status
status=0
wait "$step" || status=$?
recorded="$(sed -n 's/^{"exit_status": \([0-9]*\),.*/\1/p' "$RUN/last_run.json" 2>/dev/null || true)"
status="${recorded:-$status}"

if [[ "$(newest_checkpoint)" == "$before" ]]; then idle=$((idle + 1)); else idle=0; fi
echo "$idle" >"$RUN/idle_attempts"
again="no"
case "$notice/$status" in
    */0 | */2 | */3 | */130 | cancelled/*) ;;
    *) if ((idle <= ${MAX_RESTARTS:-10})); then again="yes"; fi ;;
esac
echo "$(date): status $status, notice: ${notice:-none}, attempts without a checkpoint: $idle, requeue: $again"
if [[ "$again" == "yes" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
