#!/usr/bin/env python3
"""Plan the layout of a training run: ``python tools/plan.py RECIPE --gpus 64 --gpu h100``, or ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("plan"))
