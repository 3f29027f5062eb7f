"""Requests to a store: which failures are tried again, and what is said of those that are not mended."""

from __future__ import annotations

import errno
from collections.abc import Callable

import fsspec
import pytest

from megatron_vl.data.remote import store
from megatron_vl.data.remote.store import PACKAGES, ask, open_store
from megatron_vl.errors import DataError
from tests.helpers.data.remote import no_pauses

__all__ = ["no_pauses"]


def failing(*failures: Exception) -> tuple[list[int], Callable[[], str]]:
    """How often the request was made, and the request, which fails as often as it is told."""
    made, left = [0], list(failures)

    def request() -> str:
        made[0] += 1
        if left:
            raise left.pop(0)
        return "bytes"

    return made, request


def named(name: str, text: str = "") -> Exception:
    """An error of a package that need not be installed."""
    return type(name, (Exception,), {})(text)


def test_a_connection_that_breaks_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(store.time, "sleep", pauses.append)
    made, request = failing(ConnectionResetError("reset"), TimeoutError(), named("ClientPayloadError", "incomplete"))
    assert ask("s3://b/k", request, "read it") == "bytes"
    assert made == [4] and pauses == [1, 4, 16]


@pytest.mark.usefixtures("no_pauses")
def test_a_connection_that_stays_broken_names_address_place_and_remedy() -> None:
    made, request = failing(*[ConnectionResetError(errno.ECONNRESET, "reset by peer")] * 9)
    with pytest.raises(DataError) as error:
        ask("s3://b/k.tar", request, "read it from byte 8,388,608 on")
    assert made == [4]
    assert str(error.value) == (
        "s3://b/k.tar: cannot read it from byte 8,388,608 on, in 4 attempts (ConnectionResetError: [Errno 104] reset "
        "by peer). Mend the connection and start again: it goes on from what is finished. Or copy the files to a disk"
    )


@pytest.mark.parametrize("error", [FileNotFoundError("k"), IsADirectoryError("k"), KeyError("bug"), TypeError("bug")])
def test_what_no_attempt_mends_is_raised_at_once(error: Exception) -> None:
    made, request = failing(error)
    with pytest.raises(type(error)):
        ask("s3://b/k", request, "read it")
    assert made == [1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (named("NoCredentialsError", "Unable to locate credentials"), "no usable credentials were found .*AWS_PROFILE"),
        (PermissionError("Access Denied"), r"the store refuses access \(PermissionError: Access Denied\).*AWS_PROFILE"),
        (named("FileExpired", "no longer exists"), "was changed while it was read; start again"),
    ],
)
def test_credentials_and_changes_are_one_line_at_once(error: Exception, expected: str) -> None:
    made, request = failing(error)
    with pytest.raises(DataError, match=f"^s3://b/k: {expected}") as found:
        ask("s3://b/k", request, "read it")
    assert made == [1] and "\n" not in str(found.value)


@pytest.mark.parametrize(("protocol", "package"), [*PACKAGES.items()])
def test_a_missing_package_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, protocol: str, package: str
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=rf"^{protocol}:// addresses need {package}: pip install {package}\b") as error:
        ask(f"{protocol}://b/k", lambda: open_store(protocol), "open it")
    assert "\n" not in str(error.value)
    assert ("megatron_vl[remote]" in str(error.value)) == (protocol == "s3")
