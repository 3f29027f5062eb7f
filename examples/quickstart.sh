#!/usr/bin/env bash
# A tiny Qwen-VL from raw data to a scored model and a report, on two cores and without GPU:
#
#   bash examples/quickstart.sh [--smoke] [--output DIR]
#
# Makes or reuses .venv, draws and prepares the data, trains stages 0 to 3 (and a blind model), exports a Hugging Face
# folder, scores held-out answers and writes runs/quickstart/report.html: about 15 minutes. Started again, it goes on
# where it stopped and reuses what is there. --smoke: the same in 3 minutes, learning nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/examples/setup_venv.sh"
ensure_venv "$root" data,evaluation,logging
# The plan is for CPU cores: it starts two and four ranks, which one GPU does not take.
export CUDA_VISIBLE_DEVICES=
exec python -m megatron_vl.cli.quickstart --setup-seconds "$SECONDS" \
    --started-as "bash examples/quickstart.sh${*:+ $*}" "$@"
