#!/usr/bin/env bash
# Stage 2 on four nodes of eight GPUs. The job goes on by itself after each time limit, until the stage is done:
#
#   sbatch --export=ALL,STAGE=2,DATA=/data/stage2,FROM=/runs/stage1,RUN=/runs/stage2 examples/slurm/pretrain_qwenvl.sbatch.sh
#
# One task per node starts torchrun there (examples/pretrain_qwenvl.sh reads Slurm's variables).
#
# 15 minutes before the limit, Slurm sends SIGUSR1 to this script (--signal). It sends SIGTERM to the ranks, which save
# after their step and end with status 75. Then it puts the job back into the queue, and --auto-resume goes on from that
# checkpoint. What else ends a run (docs/checkpoints.md lists the statuses):
#
#   0                  the stage is done
#   2, 3, 130          an error of the user, numbers that are not finite, Ctrl-C: it would end the same way again
#   1, above 128       a machine or a bug: back into the queue, at most MAX_RESTARTS times (10) in all
#   scancel            SIGTERM from outside: the ranks save, and the job is not put back
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

notice="" step=""
pass_on() {  # NOTICE
    notice="$1"
    if [[ -n "$step" ]]; then kill -TERM "$step" 2>/dev/null || true; fi
}
trap 'pass_on limit' USR1
trap 'pass_on cancelled' TERM

srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/examples/pretrain_qwenvl.sh" \
    --data-path "$DATA" --pretrained-checkpoint "$FROM" --save "$RUN" --auto-resume --save-interval 500 "$@" &
step=$!
if [[ -n "$notice" ]]; then pass_on "$notice"; fi # it came before there was a step
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal has ended the wait, not the step
    status=0
    wait "$step" || status=$?
done

restarts="${SLURM_RESTART_COUNT:-0}"
again="no"
case "$notice/$status" in
    */0 | */2 | */3 | */130 | cancelled/*) ;;
    limit/*) again="yes" ;;
    */75) again="yes" ;; # something else has stopped the ranks, and they have saved
    *) if ((restarts < ${MAX_RESTARTS:-10})); then again="yes"; fi ;;
esac
echo "$(date): status $status${notice:+ after the notice: $notice}; restarts so far: $restarts; requeue: $again"
if [[ "$again" == "yes" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
