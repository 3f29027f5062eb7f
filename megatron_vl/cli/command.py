"""How a command ends: an error of the user is one line on standard error, a bug keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl.errors import ConfigError, ExitStatus, MegatronVLError
from megatron_vl.log import write_line


def exit_status(work: Callable[[], object], *, if_interrupted: str = "interrupted") -> int:
    """Do the work of a command; its exit status, after saying what went wrong, or that Ctrl-C ended it."""
    try:
        work()
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return error.exit_status
    except KeyboardInterrupt:
        write_line(if_interrupted, error=True)
        return ExitStatus.INTERRUPTED
    return ExitStatus.DONE


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise ConfigError if the number that a flag has is too small."""
    if value < least:
        raise ConfigError(f"{flag} {value}: expected at least {least}")
