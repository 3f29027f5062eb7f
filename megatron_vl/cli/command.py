"""How a command ends: an error of the user or of the machine is one line on standard error, a bug has a traceback."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl import machine_errors
from megatron_vl.errors import ConfigError, ExitStatus, MegatronVLError
from megatron_vl.log import abandon_output, escape_what_terminals_cannot_show, write_line


def exit_status(work: Callable[[], object], *, if_interrupted: str = "interrupted") -> int:
    """Do the work of a command, the reading of its flags too; its exit status, after saying what went wrong."""
    escape_what_terminals_cannot_show()
    try:
        work()
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return error.exit_status
    except KeyboardInterrupt:
        write_line(if_interrupted, error=True)
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        abandon_output()
        return ExitStatus.PIPE_CLOSED
    except Exception as error:
        if (text := machine_errors.describe(error)) is None:
            raise
        write_line(f"error: {text}", error=True)
        return ExitStatus.USER_ERROR
    return ExitStatus.DONE


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise ConfigError if the number that a flag has is too small."""
    if value < least:
        raise ConfigError(f"{flag} {value}: expected at least {least}")
