"""End a command: an error of the user or of the machine is one line on standard error, a bug has a traceback."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_vl import machine_errors
from megatron_vl.errors import ConfigError, ExitStatus, MegatronVLError
from megatron_vl.launch import Launch, read_launch
from megatron_vl.log import abandon_output, escape_what_terminals_cannot_show, write_line


def exit_status(
    work: Callable[[], object], *, if_interrupted: str = "interrupted", less_memory: str = ""
) -> ExitStatus:
    """Do the work of a command, including the parsing of its flags. Report any error, and return the exit status.

    Args:
        work: may return a status of its own.
        if_interrupted: the message after Ctrl-C.
        less_memory: the flags that reduce memory.
    """
    escape_what_terminals_cannot_show()
    try:
        status = work()
    except MegatronVLError as error:
        _report(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        if _launch().rank == 0:
            write_line(if_interrupted, error=True)
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        abandon_output()
        return ExitStatus.PIPE_CLOSED
    except Exception as error:
        if (text := machine_errors.describe(error, less_memory=less_memory)) is None:
            raise
        _report(text)
        return ExitStatus.USER_ERROR
    return status if isinstance(status, ExitStatus) else ExitStatus.DONE


def _report(error: str) -> None:
    """Write the error, normally once: rank 0 at once, others only if rank 0 has not ended the run by then.

    A launcher stops all ranks when the first one fails, so others wait: first the node's first rank, then the rest. An
    error that only they have is written after the wait.
    """
    launch = _launch()
    if launch.rank == 0:
        write_line(f"error: {error}", error=True)
        return
    time.sleep(3.0 if launch.local_rank == 0 else 4.0)
    write_line(f"error on rank {launch.rank}: {error}", error=True)


def _launch() -> Launch:
    """Return the launch of this process. Return a world of one if the launcher's variables are wrong.

    The wrong variables are then the error to report.
    """
    try:
        return read_launch()
    except ConfigError:
        return Launch(0, 1, 0)


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise ConfigError if the number of a flag is too small."""
    if value < least:
        raise ConfigError(f"{flag} {value}: expected at least {least}")
