#!/usr/bin/env python3
"""Make questions of raw data: ``python tools/make_questions.py RECIPE --output FILE``; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("questions"))
