"""Help of every command: each default, and an example that the documentation has and its tests run."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vl.cli.parser import CommandParser
from tests.integration.documented import documented_commands

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def _help(tool: str) -> str:
    command = [sys.executable, f"tools/{tool}.py", "--help"]
    environment = os.environ | {"COLUMNS": "400"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and not done.stderr
    return done.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_help_ends_with_an_example_that_the_documentation_has(tool: str) -> None:
    text = _help(tool)
    assert "``" not in text, "markup of the docstring"
    example = " ".join(text.split("Example:")[-1].split())
    assert example in {command.text for command in documented_commands()}


def _parsers() -> Iterator[argparse.ArgumentParser]:
    for tool in TOOLS:
        source = (ROOT / "tools" / f"{tool}.py").read_text(encoding="utf-8")
        match = re.search(r'run\("(\w+)"\)', source)
        assert match
        module = importlib.import_module(f"megatron_vl.cli.{match[1]}")
        build = getattr(module, "_build_parser", None) or module.build_parser
        yield build()


def test_every_flag_shows_its_default() -> None:
    for parser in _parsers():
        shown = parser.format_help()
        for action in parser._actions:
            if action.option_strings and action.default not in (None, "", False, argparse.SUPPRESS, []):
                named = f"default: {action.default}" in " ".join(shown.split()) or "default" in (action.help or "")
                assert action.required or named, action


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--chekpoint", "x"], "error: tools/x.py: --chekpoint is not a known flag. Did you mean --checkpoint?"),
        (["--lora"], "error: tools/x.py: --lora is not a known flag (--help"),
        ([], "the following arguments are required: --checkpoint"),
    ],
)
def test_an_error_is_one_line_and_names_the_near_flag(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser("tools/x.py", "About.", example="x")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and error.count("\n") == 1
