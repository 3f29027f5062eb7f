#!/usr/bin/env bash
# Install what the tests need and run them, with the linter and the type checker:
#
#   bash tests/run.sh [--all] [arguments of pytest]
#
# --all adds the tests marked "long". Arguments choose tests as usual: bash tests/run.sh tests/unit -k packing
#
# Without arguments two processes of pytest run the tests (tests/helpers/scheduler.py): while one starts a program or
# waits, the other computes. With arguments there is one process, in which --pdb and -x do what they do elsewhere.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source examples/setup_venv.sh
ensure_venv "$root" data,evaluation,logging,mpi,dev

# Ranks and workers share the cores of the machine; one thread each is the fastest and the most reproducible.
export OMP_NUM_THREADS=1
# These tests are about the CPU. "python -m pytest tests/gpu" is about a GPU.
export CUDA_VISIBLE_DEVICES=

marks="not long"
arguments=()
processes=(-n 2 --dist loadscope --no-loadscope-reorder)  # in the order of the folders: the longest come first
if (($#)); then processes=(); fi
for argument in "$@"; do
    if [[ "$argument" == --all ]]; then marks=""; else arguments+=("$argument"); fi
done

echo "== ruff"
python -m ruff check .
python -m ruff format --check .
echo "== mypy"
python -m mypy
echo "== pytest"
python -m pytest -q -m "$marks" "${processes[@]}" "${arguments[@]}"
