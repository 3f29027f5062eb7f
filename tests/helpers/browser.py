"""Headless Chromium for tests of pages: what a page becomes, says and asks for. No name is resolved, so nothing is
fetched even by a page that tries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\] (.*)")


@dataclass(frozen=True)
class Visit:
    """What came of opening a page."""

    dom: str
    """The document once its scripts have run."""
    console: tuple[str, ...]
    """What the page, or the browser about it, wrote to the console: errors, refusals, messages."""
    requested: tuple[str, ...]
    """Addresses that the page asked for, beside its own file."""


def visit(url: str, *, screenshot: Path | None = None, size: tuple[int, int] = (1200, 900)) -> Visit:
    """Open an address in a browser without a past."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        net_log = Path(folder) / "net.json"
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}/profile", f"--log-net-log={net_log}"]
        command += [f"--window-size={size[0]},{size[1]}"]
        command += ["--dump-dom"] if screenshot is None else [f"--screenshot={screenshot}"]
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
        return Visit(done.stdout, tuple(_CONSOLE.findall(done.stderr)), _requests(net_log))


def _requests(net_log: Path) -> tuple[str, ...]:
    """Addresses whose request a page began; the browser's own have no origin, and a file needs no request."""
    log = json.loads(net_log.read_text(encoding="utf-8"))
    begins = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event["params"] for event in log["events"] if event["type"] == begins and "url" in event.get("params", {})]
    return tuple(params["url"] for params in begun if params["initiator"] != "not an origin")
