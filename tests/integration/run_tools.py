"""Run scripts of ``tools/`` one after the other in one process, since importing Megatron-Core takes seconds.

``python run_tools.py RESULTS < COMMANDS``: a command a line on standard input, each as JSON list of words; the results
are JSON lines ``[status, output]``, written as they come.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path


def run(words: list[str]) -> tuple[int, str]:
    """Run ``[script, argument ...]`` as Python would; return its exit status and what it wrote."""
    output = io.StringIO()
    sys.argv, path = words, list(sys.path)
    sys.path.insert(0, str(Path(words[0]).parent))
    status = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001 - the test shows it
            traceback.print_exc()
            status = 1
    sys.path[:] = path
    return status, output.getvalue()


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as results:
        for line in sys.stdin:
            results.write(json.dumps(run(json.loads(line))) + "\n")
            results.flush()
