"""Run one part of ``benchmarks/gpu.py`` in this process: ``python -m gpu_parts.part NAME --rows FILE``.

The rows go to the file as they come. Anything that goes wrong is a traceback and an exit status of 1.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

from gpu_parts.report import Report
from megatron_vl.launch import set_device_environment


def run_part(name: str, report: Report, *, small: bool) -> None:
    """Measure one part."""
    parts: dict[str, Callable[[], None]] = {
        "machine": _machine,
        "runs": lambda: _checks("check_runs", report),
        "layouts": lambda: _checks("check_layouts", report),
        "parity": lambda: _checks("check_parity", report),
        "resume": lambda: _checks("check_resume", report),
        "products": lambda: _products(report, small=small),
        "tiny": lambda: _tiny(report, small=small),
    }
    if name in parts:
        parts[name]()
        return
    from gpu_parts.training import measure_stage

    stage, _, variant = name.partition("-")
    if variant != "fp8":
        measure_stage(stage, report, small=small, backend=variant or "auto")
    elif reason := _without_fp8():
        print(f"left out: {reason}")
    else:
        measure_stage(stage, report, small=small, backend="transformer_engine", fp8=True)


def _without_fp8() -> str:
    """Why this machine has no FP8; empty if it has."""
    from megatron_vl.backends.presence import hide_unusable_packages
    from megatron_vl.errors import ConfigError

    hide_unusable_packages()
    from megatron_vl.model.backend import select_backend

    try:
        select_backend("transformer_engine", bf16=True, fp8_recipe="tensorwise")
    except ConfigError as error:
        return str(error)
    return ""


def _machine() -> None:
    from measure import describe_machine

    from gpu_parts.device import describe_device

    print("\n".join([describe_machine(), *describe_device()]))


def _checks(name: str, report: Report) -> None:
    from gpu_parts import checks

    getattr(checks, name)(report)


def _products(report: Report, *, small: bool) -> None:
    from gpu_parts.products import measure_products

    measure_products(report, small=small)


def _tiny(report: Report, *, small: bool) -> None:
    from gpu_parts.tiny import measure_tiny

    measure_tiny(report, small=small)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--rows", type=Path, required=True, help="where the rows go")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    # As the trainer sets it: what is timed runs in the environment of a user's run, and nothing timed is deterministic.
    set_device_environment(tensor_parallel=options.name == "layouts", deterministic=options.name == "resume")
    warnings.filterwarnings("ignore", category=UserWarning)
    run_part(options.name, Report(options.rows), small=options.small)


if __name__ == "__main__":
    main()
