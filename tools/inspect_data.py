#!/usr/bin/env python3
"""Look at a prepared data set: ``python tools/inspect_data.py PREFIX --output page.html``; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("inspect_data"))
