#!/usr/bin/env python3
"""Train a stage of Qwen-VL: ``torchrun --nproc-per-node 8 tools/train.py RECIPE [flags]``, or ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("train"))
