"""The validation sets of a run, and the names of their losses.

A loss is named after its data set's file, with as many folders before it as tell all sets of the run apart. Weights
would mean nothing here, as each set has a loss of its own, so they are refused.
"""

from __future__ import annotations

import os
from pathlib import PurePath

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError


def validation_sets(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """Name and prefix of each validation set.

    Raises:
        ConfigError: a prefix is a weight, or stands there twice.
    """
    prefixes = config.data.valid_data_path
    paths = [PurePath(os.path.normpath(prefix)).parts for prefix in prefixes]
    for prefix, path in zip(prefixes, paths, strict=True):
        if _is_number(prefix):
            raise ConfigError(
                f"data.valid_data_path is '{' '.join(prefixes)}'; expected prefixes alone, found {prefix}. Each "
                f"validation set has a loss of its own, without weights (write ./{prefix} for a file)"
            )
        if paths.count(path) > 1:
            raise ConfigError(f"data.valid_data_path names {prefix} more than once: give each validation set once")
    names, depth = list(prefixes), 0
    while depth == 0 or len(set(names)) < len(names):
        depth += 1
        names = [str(PurePath(*path[-depth:])) for path in paths]
    return tuple(zip(names, prefixes, strict=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
