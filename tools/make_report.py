#!/usr/bin/env python3
"""Write a run's report: ``tools/make_report.py RUN_DIR``; ``--help`` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.cli.start import run

if __name__ == "__main__":
    sys.exit(run("report"))
