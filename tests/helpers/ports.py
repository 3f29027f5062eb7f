"""Ports of this machine for processes that a test starts.

The system takes the ports of connections, and of listeners that ask for any port, from a range. A port of that range
which is free now may be taken a moment later, before the process of the test listens on it: ranks of another test open
hundreds of connections. So a port is drawn from below that range, where nobody gets one without asking for it.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

FIRST = 10_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL_END = 32_768
"""Where Linux begins to give ports away."""


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody."""
    end = int(RANGE.read_text(encoding="utf-8").split()[0]) if RANGE.exists() else USUAL_END
    while True:
        port = FIRST + secrets.randbelow(max(end, 2 * FIRST) - FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
