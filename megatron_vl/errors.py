"""The errors that a user can cause.

Every message names the place (configuration key, file, sample key), what was found, what was expected and what to do.
``assert`` is only for our own invariants. ``cli`` turns these errors into one line and an exit status. Anything else is
a bug and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitStatus(IntEnum):
    """Every exit status of a command; the table for users is in docs/checkpoints.md."""

    DONE = 0
    BUG = 1
    """Python's own, with a traceback; also torchrun's, whatever the status of its ranks was."""
    USER_ERROR = 2
    NOT_FINITE = 3
    """Loss, gradients or weights are not finite, so further training would be useless."""
    STOPPED = 75
    """A training was stopped by SIGTERM. It has saved, and continues when it is started again."""
    PIPE_CLOSED = 141
    """A shell's status for a program whose reader has closed the pipe, such as head."""
    INTERRUPTED = 130
    """A shell's status for a program that Ctrl-C ended; a training has saved."""


class MegatronVLError(Exception):
    """Base of all errors that are shown to a user without a traceback."""

    exit_status: ClassVar[ExitStatus] = ExitStatus.USER_ERROR


class ConfigError(MegatronVLError):
    """The configuration is wrong: unknown key, wrong type, impossible layout."""


class DataError(MegatronVLError):
    """A data file cannot be used: missing, truncated, corrupt, of another format version."""


class CheckpointError(MegatronVLError):
    """A checkpoint is absent, incomplete, or of another model."""


class FolderInUseError(MegatronVLError):
    """Another process writes to a folder; the text says which."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written: a file is missing, truncated or changed."""


class NotFiniteError(MegatronVLError):
    """A run has loss, gradients or weights that are not finite and does not recover."""

    exit_status = ExitStatus.NOT_FINITE


class PeerError(MegatronVLError):
    """Another rank has failed by a bug. That rank shows the traceback; this one only ends with it."""

    exit_status = ExitStatus.BUG


class ConversionError(MegatronVLError):
    """A Hugging Face folder and the conversion table disagree."""


class SkipSample(Exception):
    """One sample cannot be used; preparation counts it under ``reason`` and continues.

    ``reason`` is a short, stable identifier that groups samples in the manifest (``unreadable_image``). ``detail`` is
    for the list of examples.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
