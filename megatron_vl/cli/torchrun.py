"""``tools/torchrun.py``: torchrun with its own flags, and with the exit status of its ranks.

After any rank that does not exit with 0, torchrun itself exits with status 1 and a traceback of its own. It does so
even after ranks that have saved and stopped at a SIGTERM, so a scheduler cannot tell what to do. Here the status is
that of the first rank that failed, or the one that the signal stands for; see ``ExitStatus``.

torchrun makes a folder for logs and errors of the ranks in that of temporary files, and leaves it there. Here it is
removed, unless ``--redirects`` or ``--tee`` put logs into it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_vl.errors import ExitStatus
from megatron_vl.log import write_line

_OF_SIGNAL = {signal.SIGTERM: ExitStatus.STOPPED, signal.SIGINT: ExitStatus.INTERRUPTED}
_SHELL_SIGNAL_BASE = 128
_EXAMPLE = (
    "python tools/torchrun.py --nproc-per-node 2 tools/train.py examples/tiny/stage1_pretrain.yaml --data-path "
    "runs/quickstart/data/stage1_pretrain --pretrained-checkpoint runs/quickstart/model/stage0 --save "
    "runs/mine/watched --auto-resume"
)
_TIME_TO_SAVE_S = 600
"""Time that ranks have for a step and a save after a signal; large models need more than torchrun's 30 seconds."""


def _build_parser() -> argparse.ArgumentParser:
    """Build a parser for the help alone, which must work without torch."""
    from megatron_vl.cli.parser import CommandParser

    return CommandParser(
        "tools/torchrun.py",
        "torchrun with all its flags, that ends as its ranks have ended: with the status of the first one that failed, "
        "or 75 after SIGTERM and 130 after Ctrl-C, without a traceback.\n\n"
        f"After a signal the ranks have {_TIME_TO_SAVE_S} seconds to save, or what --shutdown-timeout says.",
        example=_EXAMPLE,
        usage="%(prog)s [flags of torchrun] command [flags of the command]",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["-h"], ["--help"]):
        _build_parser().print_help()
        return ExitStatus.DONE
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = torchrun.parse_args(words)
    if not any(word.startswith(("--shutdown-timeout", "--shutdown_timeout")) for word in words):
        arguments.shutdown_timeout = _TIME_TO_SAVE_S
    try:
        with _without_leftovers(arguments):
            torchrun.run(arguments)
    except SignalException as stopped:
        return _OF_SIGNAL.get(stopped.sigval, _SHELL_SIGNAL_BASE + stopped.sigval)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        if first.exitcode in set(ExitStatus) - {ExitStatus.BUG}:
            return first.exitcode  # the rank has reported the reason
        write_line(str(failed), error=True)
        return first.exitcode if first.exitcode > 0 else _SHELL_SIGNAL_BASE - first.exitcode
    return ExitStatus.DONE


@contextmanager
def _without_leftovers(arguments: argparse.Namespace) -> Iterator[None]:
    """Name a folder for logs that is removed afterwards, where no log goes there and the user has named none."""
    if arguments.log_dir or arguments.redirects != "0" or arguments.tee != "0":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True) as folder:
        arguments.log_dir = folder
        yield
