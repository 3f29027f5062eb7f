#!/usr/bin/env python3
"""torchrun that ends with the status of its ranks: ``python tools/torchrun.py [flags] tools/train.py ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("torchrun"))
