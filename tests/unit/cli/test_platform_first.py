"""Tools prepare the process before they import Megatron-Core: else each start loads torch's compiler for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.tiny import MODEL

RUN = """
import json, sys
from importlib import import_module
from megatron_vl.backends import platform

class Prepared(BaseException):
    pass

def prepare_process():
    raise Prepared

platform.prepare_process = prepare_process
import_module("megatron_vl.cli.inference_flags").check_layout = lambda options: None  # there is no checkpoint
early = {}
for tool, arguments in json.loads(sys.argv[1]).items():
    module = import_module(f"megatron_vl.cli.{tool}")
    if tool == "convert":
        import megatron_vl.conversion.convert  # what opens a published folder
        module._open_import = lambda options: None
    try:
        module.main(arguments)
    except Prepared:
        early[tool] = "megatron.core" in sys.modules
print(json.dumps(early))
"""


def test_no_tool_imports_megatron_core_before_the_process_is_prepared(prefix: str, tmp_path: Path) -> None:
    sizes = [f"--seq-length={SEQ_LENGTH}", f"--num-bpe-tokens={MODEL.num_bpe_tokens}"]
    sizes.append(f"--resampler-num-queries={MODEL.resampler.num_queries}")
    some = ["--checkpoint", "c", "--output", str(tmp_path / "output")]
    tools = {
        "evaluate_loss": [*some, "--data-path", prefix],
        "forward": [*some, "--inputs", "inputs.safetensors"],
        "generate": ["--checkpoint", "c", "--prompt", "What?"],
        "convert": ["import", "folder", str(tmp_path / "new")],
        "train": ["--preset=tiny", *sizes, f"--data-path={prefix}", "--train-iters=1"],
    }
    ran = subprocess.run([sys.executable, "-c", RUN, json.dumps(tools)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == dict.fromkeys(tools, False), ran.stderr
