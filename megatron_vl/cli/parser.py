"""One parser for the commands: help with every default and an example, and a suggestion for an unknown flag.

The description of a command is its module's docstring, so that source and help are one text. Its paragraphs are filled
to the terminal's width. Lines that begin with a space, such as tables, stay as they are. (The flags of
``tools/train.py`` are those of the configuration, which has a parser of its own: ``config/load.py``.)
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_vl.config.suggestions import suggestion
from megatron_vl.errors import ExitStatus


class CommandParser(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, prog: str, about: str | None = None, example: str = "", **settings: Any) -> None:
        """Take the command's name, its docstring, and an example, which is a documented command."""
        epilog = f"Example:\n\n  {example}" if example else None
        settings |= {"allow_abbrev": False, "formatter_class": _HelpFormatter}
        super().__init__(prog=prog, description=about, epilog=epilog, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but report an unknown flag first: it may be why a required one is missing."""
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        if not self._subparsers:
            for flag in (word.split("=")[0] for word in args if re.match(r"--\w", word)):
                if flag not in known:
                    self.error(f"{flag} is not a known flag{suggestion(flag.replace('_', '-'), known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with one line and the status of a user's error."""
        self.exit(ExitStatus.USER_ERROR, f"error: {self.prog}: {message} (--help lists the flags)\n")


class _HelpFormatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.replace("``", "").strip().split("\n\n")
        return "\n\n".join(textwrap.indent(self._fill(part, width - len(indent)), indent) for part in paragraphs)

    @staticmethod
    def _fill(paragraph: str, width: int) -> str:
        if any(line.startswith(" ") for line in paragraph.splitlines()):
            return textwrap.indent(textwrap.dedent(paragraph), "  ")
        return textwrap.fill(" ".join(paragraph.split()), width)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_none = action.default in (None, "", False, argparse.SUPPRESS) or action.default == []
        if has_none or not action.option_strings or action.required or "default" in text:
            return text
        return f"{text} (default: %(default)s)"
