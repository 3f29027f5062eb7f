#!/usr/bin/env python3
"""Render synthetic data: ``tools/make_synthetic_data.py OUT [flags]``; ``--help`` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("synthetic"))
