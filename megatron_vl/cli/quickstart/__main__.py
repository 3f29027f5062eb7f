"""``python -m megatron_vl.cli.quickstart``."""

import sys

from megatron_vl.cli.quickstart.main import main

if __name__ == "__main__":
    sys.exit(main())
