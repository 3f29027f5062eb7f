#!/usr/bin/env bash
# Run the tests of what touches Megatron-Core with the newest supported version, which needs Python 3.12 or 3.13; where
# neither is found, or nothing can be installed, say so and do nothing:
#
#   bash tests/newest_core.sh [arguments of pytest]
#
# Without arguments the tests below run, and checkpoints go from one version to the other and back. The environment is
# .venv-newest in the checkout; the other one is .venv, of tests/run.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source examples/setup_venv.sh
if [[ ! -e .venv-newest ]] && ! find_python "13 12" > /dev/null 2>&1; then
    echo "newest Megatron-Core: skipped, neither Python 3.13 nor 3.12 was found"
    exit 0
fi
install() { ensure_venv "$root" data,evaluation,logging,mpi,dev .venv-newest "13 12"; }
if ! (install); then  # torch has a wheel of its own for each Python, which may not be at hand
    echo "newest Megatron-Core: skipped, its environment could not be installed"
    exit 0
fi
install  # what is installed already is only activated
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
python -c 'from importlib.metadata import version; print("== Megatron-Core", version("megatron-core"))'
if (($#)); then exec python -m pytest -q "$@"; fi

# Of the layouts one of each kind, with two sets of frozen parts, and every one with messages that are received late.
layouts="tp2-pp2-dp1 or tp1-pp2-dp2 or tp2-pp1-dp2 or tp1-pp4-dp1"
python -m pytest -q -m "not long" \
    tests/parallel/test_layouts.py tests/parallel/test_golden.py tests/parallel/test_checkpoints.py \
    tests/integration/test_resume.py tests/unit/backends tests/unit/checkpoint tests/unit/parallel \
    tests/unit/planning/test_schedule.py tests/unit/planning/test_calls.py \
    -k "not test_layouts or late_receiver or (($layouts) and not legacy and not text)"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
newest="$root/.venv-newest/bin/python" other="$root/.venv/bin/python"
"$newest" -m tests.parallel.exchange write "$folder/newest"
"$other" -m tests.parallel.exchange read "$folder/newest"
"$other" -m tests.parallel.exchange write "$folder/other"
"$newest" -m tests.parallel.exchange read "$folder/other"
