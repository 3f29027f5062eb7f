"""How a command ends: an error of the user is one line on standard error and status 2, a bug keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl.errors import MegatronVLError
from megatron_vl.log import write_line

EXIT_USER_ERROR = 2


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command; 0, or 2 after an error of the user."""
    try:
        work()
    except MegatronVLError as error:
        write_line(f"error: {error}", error=True)
        return EXIT_USER_ERROR
    return 0
