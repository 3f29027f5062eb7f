"""Write everything that goes to the terminal.

Results for a reader or another program are lines on standard output (:func:`write_line`). Messages about the run itself
are Python logging on standard error. Rank 0 logs for all with :func:`log_rank_0`, and a warning that concerns one rank
carries its number. Nothing is configured at import: a command calls :func:`setup_logging` once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings

from megatron_vl.launch import read_launch

ROOT = "megatron_vl"
_NOT_FOR_USERS = {
    "megatron.core.dist_checkpointing.strategies.common": "is deprecated",  # at each load
    "megatron.core.dist_checkpointing.strategies.torch": "is deprecated",  # at the first save
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # Megatron-Core 0.19 imports it
}
"""Loggers, and the messages of each that :func:`silence_dependency_warnings` hides."""
_TORCH_SAYS = (
    r"barrier\(\): using the device",  # over NCCL, at each save; each rank has selected its device before
    "The argument order of load has been changed",  # at each load of Megatron-Core 0.19, in which each rank reads alone
    "torch.distributed is disabled, unavailable or uninitialized",
)


def write_line(text: str = "", *, error: bool = False) -> None:
    """Write ``text`` and a line end to standard output, or to standard error, at once."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def escape_what_terminals_cannot_show() -> None:
    """Let a terminal of another encoding show escapes (``\\xd7``) for missing characters, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Redirect a standard output without a reader to the null device, so that nothing fails when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_rank_0(message: str, *, level: int = logging.INFO) -> None:
    """Log ``message`` on rank 0 and nowhere else."""
    if read_launch().rank == 0:
        logging.getLogger(ROOT).log(level, message)


def warn_loudly(line: str) -> None:
    """Log a warning on rank 0 between two rules, so that nobody overlooks it."""
    for text in ("!" * len(line), line, "!" * len(line)):
        log_rank_0(text, level=logging.WARNING)


def setup_logging(level: int = logging.INFO) -> None:
    """Send this package's log to standard error, with the rank where there is more than one; safe to call twice."""
    launch = read_launch()
    prefix = f"[rank {launch.rank}] " if launch.world_size > 1 and launch.rank > 0 else ""
    logger = logging.getLogger(ROOT)
    logger.handlers.clear()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _is_for_users(record: logging.LogRecord) -> bool:
    return _NOT_FOR_USERS[record.name] not in record.getMessage()


def silence_dependency_warnings() -> None:
    """Hide warnings of Megatron-Core and torch for their own authors, once a rank, a step or a save.

    Users cannot act on deprecations between the two, and ``backend`` in the log reports that Transformer Engine and
    Apex are absent. Warnings of other modules, and of other kinds, stay.
    """
    for name in _NOT_FOR_USERS:
        logging.getLogger(name).addFilter(_is_for_users)
    for module in (r"torch(\.|$)", r"megatron\.core(\.|$)"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core(\.|$)")
    for message in _TORCH_SAYS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
