#!/usr/bin/env python3
"""Look at a machine, or at all machines of a run, before training: see ``python tools/doctor.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("doctor"))
