"""Write the resolved form of every recipe to tests/golden/recipes: ``python tests/golden/regenerate.py``.

A recipe lists only what differs from the defaults. Its golden file has everything, so a changed default or preset shows
as a difference in each recipe that it touches.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from megatron_vl.config.load import dump_config, load_config  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "recipes"


def recipes() -> dict[str, Path]:
    """Recipes of training stages by the name of their golden file: ``tiny_stage1_pretrain.yaml``."""
    paths = sorted((ROOT / "examples").glob("*/stage*.yaml"))
    return {f"{path.parent.name}_{path.name}": path for path in paths}


def resolved(recipe: Path) -> str:
    """The golden text of a recipe."""
    return f"# {recipe.relative_to(ROOT)} with every default; see regenerate.py\n" + dump_config(load_config(recipe))


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.yaml"):
        old.unlink()
    for name, recipe in recipes().items():
        (GOLDEN / name).write_text(resolved(recipe), encoding="utf-8")


if __name__ == "__main__":
    main()
