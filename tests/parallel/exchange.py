"""Write checkpoints for another version of Megatron-Core, or go on from what another version has written:

    python -m tests.parallel.exchange write DIR
    python -m tests.parallel.exchange read DIR

``DIR/losses.json`` holds, for each checkpoint, the loss of the step that follows. ``tests/newest_core.sh`` runs both
commands in the environments of both versions.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_vl.config.schema import RunConfig
from megatron_vl.log import silence_dependency_warnings
from tests.helpers.ranks import Ranks, Start
from tests.helpers.tiny import tiny_config
from tests.parallel.saving import train_steps

SHARDED = {"use_distributed_optimizer": True}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "pipeline": {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
    "data": {"parallel": SHARDED},
    "vision on every rank": {"parallel": SHARDED | {"pipeline_model_parallel_size": 2, "vision_parallel": "data"}},
    "data, bf16": {"parallel": SHARDED, "training": {"bf16": True}},
}
TOLERANCE = 1e-6
"""Of a loss. The builds of torch for two versions of Python need not round alike."""


def write(root: Path, ranks: Ranks) -> None:
    """Train two steps in each case, save, and record the loss of the third."""
    losses = {}
    for case, fields in CASES.items():
        ranks.run(train_quietly, _config(fields), 2, root / case, None)
        losses[case] = ranks.run(train_quietly, _config(fields), 1, None, root / case)[0][0]
    (root / "losses.json").write_text(json.dumps({"version": version("megatron-core"), "losses": losses}))


def read(root: Path, ranks: Ranks) -> None:
    """Go on from each checkpoint, at its own layout and at the next case's, and compare the loss of the third step."""
    written = json.loads((root / "losses.json").read_text())
    print(f"Megatron-Core {written['version']} -> {version('megatron-core')}")
    for case, after in zip(CASES, [*list(CASES)[1:], None], strict=True):
        expected = written["losses"][case]
        for layout in (case, after):
            if layout is None or ("training" in CASES[layout]) != ("training" in CASES[case]):
                continue  # another precision gives another loss
            for (loss,) in ranks.run(train_quietly, _config(CASES[layout]), 1, None, root / case):
                assert math.isclose(loss, expected, rel_tol=TOLERANCE), (case, layout, loss, expected)
            print(f"  {case}, read as {layout}: loss {loss:.9f}, expected {expected:.9f}")


def train_quietly(start: Start, config: RunConfig, steps: int, save: Path | None, load: Path | None) -> list[float]:
    """As ``train_steps``, without what dependencies log for their authors."""
    silence_dependency_warnings()
    return train_steps(start, config, steps, save, load)


def _config(fields: dict[str, dict[str, Any]]) -> RunConfig:
    return tiny_config(**fields)


def main() -> None:
    """Run the command of the command line."""
    _, action, folder = sys.argv
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(2)
    try:
        {"write": write, "read": read}[action](root, ranks)
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
