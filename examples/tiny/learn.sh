#!/usr/bin/env bash
# The quickstart with more steps, so that the tiny model learns to see: 33 minutes or more on two cores.
#
#   bash examples/tiny/learn.sh [--output DIR]
#
# Started again, it goes on where it stopped; the report counts the time of all starts. Writes runs/learn/report.html
# and docs/results/learn.json and learn.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/examples/setup_venv.sh"
ensure_venv "$root" data,evaluation,logging
export CUDA_VISIBLE_DEVICES=  # as examples/quickstart.sh
exec python -m megatron_vl.cli.quickstart --profile learn --results "$root/docs/results" --setup-seconds "$SECONDS" \
    --started-as "bash examples/tiny/learn.sh${*:+ $*}" "$@"
