"""The data sets that a run names: how they are written, and whether their files are there.

Unlike the checks of ``validate.py``, :func:`check_data_files` needs the machine on which the data lies.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError

TINY_COMMANDS = (
    "To see a run from raw data to scores on this machine: bash examples/quickstart.sh\n"
    "or, once that has prepared its data: python tools/train.py examples/tiny/stage1_pretrain.yaml "
    "--data-path runs/quickstart/data/stage1_pretrain --pretrained-checkpoint runs/quickstart/model/stage0"
)
"""What to try where there is no data, or a machine too small for the published model."""


def check_data_files(config: RunConfig) -> None:
    """Training data is given, and each data set that is named has its manifest; raises ``ConfigError``."""
    if not config.data.data_path:
        raise ConfigError(
            "data.data_path is empty: there is nothing to train on. Give the prefix of a packed data set "
            f"(--data-path PREFIX, made by tools/prepare_data.py).\n{TINY_COMMANDS}"
        )
    for key in ("data_path", "valid_data_path"):
        for item in getattr(config.data, key):
            if _as_number(item) is not None and Path(f"{item}.json").is_file():
                raise ConfigError(
                    f"data.{key}: {item} is taken for a weight, but there is a data set {item}.json; write ./{item} "
                    f"for the data set, or +{item} for the weight"
                )
        for _, prefix in parse_data_path(getattr(config.data, key), key=f"data.{key}"):
            manifest = Path(f"{prefix}.json")
            if not manifest.is_file():
                if unfinished := unfinished_data_set(prefix):
                    raise ConfigError(f"data.{key}: {unfinished}")
                # Of a user's own data, the quickstart knows nothing.
                hint = f".\n{TINY_COMMANDS}" if "quickstart" in manifest.parts else ""
                raise ConfigError(
                    f"data.{key}: there is no data set {prefix} (its manifest {manifest} is missing). Prepare it with "
                    f"tools/prepare_data.py{hint}"
                )


def unfinished_data_set(prefix: str | Path) -> str | None:
    """What to say where rows are there and no manifest of their own is; None if the rows are not there either."""
    path = Path(prefix)
    block = re.fullmatch(r"(.+)\.\d{5,}-of-\d{5,}", path.name)
    if block and path.with_name(f"{block[1]}.json").is_file():
        return f"{prefix} is one block of the data set {path.with_name(block[1])}; give that prefix"
    blocks = sorted(path.parent.glob(f"{glob.escape(path.name)}.?????-of-?????.tokens.bin"))
    rows = next((rows for rows in (Path(f"{prefix}.tokens.bin"), *blocks) if rows.is_file()), None)
    if rows is None:
        return None
    return (
        f"{rows} is there, but {prefix}.json, which is written last, is not: the copy or the preparation is "
        f"unfinished. Copy all files {prefix}.* again, or give the command of the preparation again"
    )


def parse_data_path(items: Sequence[str], *, key: str = "data.data_path") -> list[tuple[float, str]]:
    """Return (weight, prefix) of each data set from prefixes alone (equal weights) or weight and prefix in turn.

    Weights are relative and need not sum to one. Raises ``ConfigError`` naming ``key`` and the item.
    """
    numbers = [_as_number(item) for item in items]
    if all(number is None for number in numbers):
        return [(1.0, prefix) for prefix in items]
    written = " ".join(items)
    form = f"{key} is '{written}'; expected prefixes alone, or weight and prefix in turn: 0.7 A 0.3 B"
    if len(items) % 2:
        first = next(item for item, number in zip(items, numbers, strict=True) if number is not None)
        raise ConfigError(
            f"{form}. Found {len(items)} items, which do not pair up. A number is a weight (write ./{first} for a file)"
        )
    pairs: list[tuple[float, str]] = []
    for position in range(0, len(items), 2):
        weight, prefix = numbers[position], items[position + 1]
        if weight is None:
            raise ConfigError(f"{form}. Item {position + 1}, '{items[position]}', is not a weight")
        if numbers[position + 1] is not None:
            raise ConfigError(f"{form}. Item {position + 2}, '{prefix}', is a number (write ./{prefix} for a file)")
        if not 0 < weight < math.inf:
            raise ConfigError(f"{form}. The weight of {prefix} is {items[position]}; it must be above 0 and finite")
        pairs.append((weight, prefix))
    return pairs


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
