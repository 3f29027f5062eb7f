"""A headless Chromium that lays out pages from bytes: no network, no scripts, one page at a time.

It is driven over its debugging pipe (file descriptors 3 and 4, messages of JSON ended by a zero byte), which
needs no port and no library. Nothing reaches a network: every request is intercepted, and all but the page
itself are aborted; should one slip past, there is no name that resolves and no proxy that answers. Scripts of
the page do not run. A page that does not finish in time costs the browser, which is started again for the
next one.
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
ADDRESS = "https://page.invalid/"
"""Under which the page is served to the browser; the domain .invalid exists nowhere."""
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
    """The program to run: ``given``, or the first of the usual names; raises DataError."""
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
    """A running Chromium; a context manager that ends it."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="megatron_vl_chromium_")
        self._number = 0
        self._rest = b""
        self._served: dict[str, tuple[bytes, str]] = {}
        """By session the page that it may load, until it has."""
        incoming, to_browser = _pipe()
        from_browser, outgoing = _pipe()
        arguments = [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        if os.geteuid() == 0:
            arguments.insert(1, "--no-sandbox")  # Chromium's sandbox refuses to be set up by root
        null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        pipes = [(os.POSIX_SPAWN_DUP2, incoming, 3), (os.POSIX_SPAWN_DUP2, outgoing, 4)]
        environment = {"HOME": self._profile, "PATH": os.defpath, "LANG": "C.UTF-8"}
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
        """A page that was loaded in a view of ``size`` pixels; raises BrowserGone, SkipSample('unrendered_page')."""
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
        """The result of a command; raises BrowserGone, or SkipSample if the browser refuses."""
        number = self._send(method, parameters or {}, session)
        while True:
            message = self.receive(deadline or time.monotonic() + START_SECONDS)
            if message.get("id") == number:
                if "error" in message:
                    raise SkipSample("unrendered_page", f"{method}: {message['error'].get('message')}")
                return dict(message["result"])

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; requests of the page are answered on the way."""
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
        """The result of a command."""
        return self._browser.call(method, parameters, session=self._session, deadline=self._deadline)

    def wait(self, event: str) -> None:
        """Return when the event has come."""
        message: dict[str, Any] = {}
        while (message.get("method"), message.get("sessionId")) != (event, self._session):
            message = self._browser.receive(self._deadline)

    def resize(self, width: int, height: int) -> None:
        """Lay the page out in a view of this size."""
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", view)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of ours."""
        found = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in found:
            raise SkipSample("unrendered_page", str(found["exceptionDetails"].get("text")))
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The view as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png"})["data"])


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are out of the way of the numbers that the browser wants, and closed in other programs."""
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
