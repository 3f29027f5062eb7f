# syntax=docker/dockerfile:1
# GPU image: NVIDIA's PyTorch image with its own torch, Transformer Engine and Apex left as they are.
#
#   docker build -t megatron_vl . && docker run --gpus all --ipc=host -it megatron_vl
#
# Tag: Megatron-Core 0.16.1 takes Transformer Engine >= 2.9, < 2.12. The 26.01 image has 2.11, with torch 2.10 and Python
# 3.12; 25.09 still has an older one. The last step fails the build for a tag that does not fit.
FROM nvcr.io/nvidia/pytorch:26.01-py3

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
pip install megatron-core==0.16.1
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

from packaging.version import Version

found = Version(version("transformer_engine")).release
assert (2, 9) <= found < (2, 12), f"Transformer Engine {found} is not in [2.9, 2.12)"
PYTHON
BASH
