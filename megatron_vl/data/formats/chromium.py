"""A headless Chromium that lays out pages from bytes: no network, no scripts, one page at a time.

It is controlled over its debugging pipe (file descriptors 3 and 4, JSON messages ended by a zero byte), which needs no
port and no library. No request reaches a network: every request is intercepted, and all but the page itself are
aborted. As a second barrier, no host name resolves and no proxy answers. Scripts of the page do not run. If a page does
not finish in time, the browser is ended, and a new one is started for the next page.

Playwright draws the same pixels. But it evaluates expressions without a time limit, so a browser that hangs would stop
the preparation. It also takes 165 MB on the disk and runs a process of Node.js beside each browser.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from megatron_vl.errors import DataError, SkipSample

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SOCKET = "org.chromium.Chromium.123456/SingletonSocket"
"""What a browser makes in its folder of temporary files, and leaves there when a signal ends it."""
SOCKET_BYTES = 107
"""The longest name of a socket (unix(7)); with a longer one the browser ends at once."""
ADDRESS = "https://page.invalid/"
"""Address under which the page is served to the browser. The domain .invalid never exists."""
START_SECONDS = 60.0
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--mute-audio",
    "--font-render-hinting=none",
    "--force-color-profile=srgb",
    "--proxy-server=127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find_browser(given: str = "") -> str:
    """Return the program to run: ``given``, or the first usual name that is found. Raises DataError if none is."""
    for name in (given,) if given else NAMES:
        if found := shutil.which(name):
            return found
    looked = given or ", ".join(NAMES)
    raise DataError(
        f"HTML pages are rendered by Chromium, and {looked} was not found: install it (Debian: apt-get install "
        "chromium), or name the program in the source's option 'browser'"
    )


class BrowserGone(Exception):
    """The browser ended, or did not answer in time."""


class Browser:
    """A running Chromium, as a context manager that ends it."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="megatron_vl_chromium_")
        self._number = 0
        self._rest = b""
        self._served: dict[str, tuple[bytes, str]] = {}
        """For each session, the page that it may load, until it has loaded it."""
        incoming, to_browser = _pipe()
        from_browser, outgoing = _pipe()
        arguments = [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        if os.geteuid() == 0:
            arguments.insert(1, "--no-sandbox")  # root cannot set up Chromium's sandbox
        null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        pipes = [(os.POSIX_SPAWN_DUP2, incoming, 3), (os.POSIX_SPAWN_DUP2, outgoing, 4)]
        environment = {"HOME": self._profile, "PATH": os.defpath, "LANG": "C.UTF-8"} | _temporary(self._profile)
        self._pid = os.posix_spawn(program, arguments, environment, file_actions=[*null, *pipes], setpgroup=0)
        os.close(incoming)
        os.close(outgoing)
        self._write, self._read = to_browser, from_browser

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)
        os.close(self._read)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:
                break
            if _ended(self._pid, 5.0):
                break
        shutil.rmtree(self._profile, ignore_errors=True)

    @contextmanager
    def page(self, data: bytes, content_type: str, size: tuple[int, int], seconds: float) -> Iterator[Page]:
        """Yield a page that was loaded in a view of ``size`` (width, height) in pixels.

        Raises:
            BrowserGone: The browser ended or did not answer.
            SkipSample: ``unrendered_page``.
        """
        deadline = time.monotonic() + seconds
        target = self.call("Target.createTarget", {"url": "about:blank"}, deadline=deadline)["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, deadline=deadline)
        page = Page(self, attached["sessionId"], deadline)
        self._served = {attached["sessionId"]: (data, content_type)}
        page.call("Emulation.setScriptExecutionDisabled", {"value": True})
        page.resize(*size)
        page.call("Fetch.enable", {"patterns": [{"urlPattern": "*"}]})
        page.call("Page.enable")
        page.call("Page.navigate", {"url": ADDRESS})
        page.wait("Page.loadEventFired")
        try:
            yield page
        finally:
            with suppress(BrowserGone):
                self._send("Target.closeTarget", {"targetId": target}, "")

    def call(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, session: str = "", deadline: float = 0.0
    ) -> dict[str, Any]:
        """Return the result of a command.

        Raises:
            BrowserGone: The browser ended or did not answer.
            SkipSample: The browser refused the command.
        """
        number = self._send(method, parameters or {}, session)
        while True:
            message = self.receive(deadline or time.monotonic() + START_SECONDS)
            if message.get("id") == number:
                if "error" in message:
                    raise SkipSample("unrendered_page", f"{method}: {message['error'].get('message')}")
                return dict(message["result"])

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next message, and answer requests of the page that come before it. Raises BrowserGone."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 2**16) if ready else b""
            if not data:
                raise BrowserGone("the browser ended" if ready else "the page took too long")
            self._rest += data
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if message.get("method") == "Fetch.requestPaused":
            self._answer(message["params"], message["sessionId"])
        return message

    def _answer(self, request: Mapping[str, Any], session: str) -> None:
        if session in self._served and request["request"]["url"] == ADDRESS:
            data, content_type = self._served.pop(session)
            headers = [{"name": "Content-Type", "value": content_type}]
            body = base64.b64encode(data).decode()
            answer = {"responseCode": 200, "responseHeaders": headers, "body": body}
            self._send("Fetch.fulfillRequest", {"requestId": request["requestId"], **answer}, session)
        else:
            aborted = {"requestId": request["requestId"], "errorReason": "Aborted"}
            self._send("Fetch.failRequest", aborted, session)

    def _send(self, method: str, parameters: Mapping[str, Any], session: str) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = memoryview(json.dumps(message).encode() + b"\0")
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except BrokenPipeError as error:
            raise BrowserGone("the browser ended") from error
        return self._number


class Page:
    """A loaded page."""

    def __init__(self, browser: Browser, session: str, deadline: float) -> None:
        self._browser, self._session, self._deadline = browser, session, deadline

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the result of a command."""
        return self._browser.call(method, parameters, session=self._session, deadline=self._deadline)

    def wait(self, event: str) -> None:
        """Wait until the event has occurred."""
        message: dict[str, Any] = {}
        while (message.get("method"), message.get("sessionId")) != (event, self._session):
            message = self._browser.receive(self._deadline)

    def resize(self, width: int, height: int) -> None:
        """Lay out the page in a view of this size in pixels."""
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", view)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, which must be from this package."""
        found = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in found:
            raise SkipSample("unrendered_page", str(found["exceptionDetails"].get("text")))
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """Return the view as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png"})["data"])


def _temporary(profile: str) -> dict[str, str]:
    """Return what makes temporary files part of the profile, which is removed; nothing where the path is too long."""
    fits = len(os.fsencode(f"{profile}/{SOCKET}")) <= SOCKET_BYTES
    return {"TMPDIR": profile} if fits else {}


def _pipe() -> tuple[int, int]:
    """Return the two ends of a pipe.

    Their numbers do not clash with those of the browser, and other programs do not inherit them.
    """
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


def _ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.02)
    return False
