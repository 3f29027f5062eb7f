# syntax=docker/dockerfile:1
# GPU image: NVIDIA's PyTorch image with its own torch, Transformer Engine and Apex left as they are.
#
#   docker build -t megatron_vl . && docker run --gpus all --ipc=host -it megatron_vl
#
# Tag: 26.06 is the image with which Megatron-LM's own main branch is tested. Its Python is 3.12 or newer, so it takes
# Megatron-Core 0.19.2, which sets no upper limit for Transformer Engine (docs/megatron_core.md). This file was not built
# and nothing of it was run; the last step fails the build for an image that does not fit. For Megatron-Core 0.16.1, with
# which docs/results/gpu.md was measured, an image needs Transformer Engine from 2.9 and below 2.12, as 26.01 has it.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG MEGATRON_CORE=0.19.2
FROM ${IMAGE}
ARG MEGATRON_CORE

WORKDIR /workspace/megatron_vl

COPY <<'PYTHON' /opt/versions.py
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "transformer_engine", "apex"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "absent")
PYTHON
RUN python /opt/versions.py | tee /opt/versions-before

# --no-deps: pip must not resolve torch anew. What the image has stays; what it lacks comes at the tested version. The
# image's own list of versions (PIP_CONSTRAINT) would contradict ours and is not needed, since nothing is replaced.
COPY constraints-cpu.txt ./
RUN <<'BASH'
set -eu
export PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1
pip install "megatron-core==$MEGATRON_CORE"
for package in psutil numpy llvmlite numba pillow safetensors tiktoken regex pyyaml tqdm dashscope tensorboard \
    scikit-image lazy-loader imageio tifffile matplotlib rapidfuzz jinja2 pytest hypothesis sortedcontainers; do
    python -c "import importlib.metadata as m; m.version('$package')" 2>/dev/null \
        || pip install -c constraints-cpu.txt "$package"
done
BASH

COPY . .
RUN PIP_CONSTRAINT= pip install --no-cache-dir --no-deps --no-build-isolation -e .

RUN <<'BASH'
set -eu
python /opt/versions.py | diff /opt/versions-before -
python - <<'PYTHON'
from importlib.metadata import version

from megatron_vl.backends.versions import TRANSFORMER_ENGINE, installed_core, release

found, core = version("transformer_engine"), installed_core()
assert release(found) in TRANSFORMER_ENGINE[core], f"Transformer Engine {found}: {core} takes {TRANSFORMER_ENGINE[core]}"
PYTHON
BASH
