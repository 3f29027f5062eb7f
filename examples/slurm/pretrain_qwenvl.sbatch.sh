#!/usr/bin/env bash
# Stage 2 on four nodes of eight GPUs. Submit again, with the same command, to go on from the last checkpoint:
#
#   sbatch --export=ALL,STAGE=2,DATA=/data/stage2,FROM=/runs/stage1,RUN=/runs/stage2 examples/slurm/pretrain_qwenvl.sbatch.sh
#
# One task per node starts torchrun there (examples/pretrain_qwenvl.sh reads Slurm's variables). The run saves and ends
# by itself 15 minutes before Slurm would kill it, whatever the save interval is.
#SBATCH --job-name=qwen-vl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
: "${DATA:?prefix of a packed data set}" "${FROM:?checkpoint of the previous stage}" "${RUN:?directory of this run}"
export GPUS_PER_NODE=8

srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/examples/pretrain_qwenvl.sh" \
    --data-path "$DATA" --pretrained-checkpoint "$FROM" --save "$RUN" --auto-resume \
    --save-interval 500 --exit-duration-in-mins 225 "$@"
