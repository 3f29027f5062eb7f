"""What is profiled, and where a profile is written: the fields ``logging.profile*`` and what belongs to them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_vl.config.schema import LoggingConfig, RunConfig
from megatron_vl.errors import ConfigError

_FIELDS = tuple(
    item.name
    for item in fields(LoggingConfig)
    if item.name.startswith("profile_") or item.name in ("use_pytorch_profiler", "record_memory_history")
)


def profile_folder(config: RunConfig) -> Path:
    """Return the directory of a run's profiles."""
    folder = config.logging.profile_dir
    return Path(folder) if folder else Path(config.checkpoint.save or "") / "profile"


def profile_ranks(config: RunConfig) -> tuple[int, ...]:
    """Return the ranks that write a trace."""
    return tuple(map(int, config.logging.profile_ranks))


def check_profile(config: RunConfig, world_size: int, *, cuda: bool) -> None:
    """Check that the steps and ranks of a profile are in the run, and that it has a place.

    Raises:
        ConfigError: for the first thing wrong, also if something of a profile is given without one.
    """
    logging, usual = config.logging, LoggingConfig()
    if not logging.profile:
        given = [name for name in _FIELDS if getattr(logging, name) != getattr(usual, name)]
        if given:
            raise ConfigError(
                f"logging.{given[0]} has no effect without logging.profile: add --profile, or leave it out"
            )
        return
    if not (logging.profile_dir or config.checkpoint.save):
        raise ConfigError("logging.profile is given, but nothing says where to write: add --save or --profile-dir")
    start, end, last = logging.profile_step_start, logging.profile_step_end, config.training.train_iters
    if start >= end:
        raise ConfigError(
            f"logging.profile_step_start {start} is not below logging.profile_step_end {end}: steps {start + 1} to "
            f"{end} would be profiled"
        )
    if start >= last:
        raise ConfigError(
            f"logging.profile_step_start {start} is not below training.train_iters {last}: the run ends before the "
            "first step that is profiled"
        )
    for text in logging.profile_ranks:
        if not (text.isascii() and text.isdigit() and int(text) < world_size):
            raise ConfigError(
                f"logging.profile_ranks: {text!r} is no rank of this run; expected numbers from 0 to {world_size - 1}"
            )
    if logging.record_memory_history and not cuda:
        raise ConfigError("logging.record_memory_history: there is no CUDA device here whose memory could be recorded")
