"""How a command ends: an error of the user is one line on standard error and status 2, a bug keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl.errors import ConfigError, MegatronVLError
from megatron_vl.log import write_line

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""As a shell says it of a program that Ctrl-C ended."""


def exit_status(work: Callable[[], object], *, if_interrupted: str = "interrupted") -> int:
    """Do the work of a command; 0, 2 after an error of the user, or 130 after Ctrl-C, with what to say then."""
    try:
        work()
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        write_line(if_interrupted, error=True)
        return EXIT_INTERRUPTED
    return 0


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise ConfigError if the number that a flag has is too small."""
    if value < least:
        raise ConfigError(f"{flag} {value}: expected at least {least}")
