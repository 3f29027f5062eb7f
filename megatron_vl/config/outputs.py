"""Where a run writes beside its checkpoints: refused before anything is loaded if that cannot work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_vl.config.profile import profile_folder
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.files import try_folder


def check_outputs(config: RunConfig) -> None:
    """Refuse logs, events and checkpoints that cannot be written here; for the rank that writes them.

    Raises:
        ConfigError: a directory cannot be made or written to, or a package is missing.
    """
    logging = config.logging
    for key, value, package in (
        ("tensorboard_dir", logging.tensorboard_dir, "tensorboard"),
        ("wandb_project", logging.wandb_project, "wandb"),
    ):
        if value and importlib.util.find_spec(package) is None:
            raise ConfigError(f"logging.{key} is {value}, but {package} is not installed: pip install {package}")
    if config.checkpoint.save:
        _check_directory(Path(config.checkpoint.save), "checkpoint.save")
    if logging.tensorboard_dir:
        _check_directory(Path(logging.tensorboard_dir), "logging.tensorboard_dir")
    if logging.profile:
        _check_directory(profile_folder(config), "logging.profile_dir", keep=False)  # a run may write no profile
    if logging.log_file:
        _check_directory(Path(logging.log_file).parent, "logging.log_file")
        if Path(logging.log_file).is_dir():
            raise ConfigError(f"logging.log_file: {logging.log_file} is a directory; expected a file")


def _check_directory(path: Path, key: str, *, keep: bool = True) -> None:
    try:
        try_folder(path, keep=keep)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} cannot be written to ({error.strerror or error}); choose another place, or mend its rights "
            "or its room"
        ) from error
