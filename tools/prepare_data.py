#!/usr/bin/env python3
"""Prepare packed rows from raw data sets: ``python tools/prepare_data.py RECIPE --output PREFIX``; see
``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("prepare"))
