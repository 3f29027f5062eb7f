"""What ``energon prepare`` writes beside the tars of a folder, without its questions."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator


def main(folder: Path) -> None:
    """Index the tars of ``folder`` and describe them as a captioning data set."""
    names = sorted(path.name for path in folder.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    description = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": "jpg", "caption": "txt"},
    }
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
