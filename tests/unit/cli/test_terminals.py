"""Terminals that show ASCII only, and readers that go away, such as head."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.cli.command import exit_status
from megatron_vl.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
ASCII = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
CHATTER = """
import sys
from megatron_vl.cli.command import exit_status
from megatron_vl.log import write_line
sys.exit(exit_status(lambda: [write_line("2 \u00d7 3 " * 1000) for _ in range(1000)]))
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_every_tool(tool: str) -> None:
    command = f"{sys.executable} tools/{tool} --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ASCII, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, ExitStatus.PIPE_CLOSED) and done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize(("reader", "status"), [("cat", 0), ("head -n 1", ExitStatus.PIPE_CLOSED)])
def test_what_a_command_writes(reader: str, status: int) -> None:
    command = f"{sys.executable} -c '{CHATTER}' | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ASCII, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and not done.stderr
    assert done.stdout.startswith(r"2 \xd7 3 ")


def test_a_full_disk_is_a_line_and_a_bug_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    assert exit_status(lambda: fail(OSError(28, "No space left on device", "out.json"))) == ExitStatus.USER_ERROR
    assert capsys.readouterr().err == "error: out.json: No space left on device\n"
    with pytest.raises(ValueError, match="bug"):
        exit_status(lambda: fail(ValueError("bug")))


INTERRUPTED = """
import runpy, sys
class Interrupts:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("megatron_vl.cli.") and name != "megatron_vl.cli.start":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_while_a_command_is_imported_is_a_line(tool: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, f"tools/{tool}"]
    done = subprocess.run(command, cwd=ROOT, env=ASCII, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (ExitStatus.INTERRUPTED, "", "interrupted\n")
