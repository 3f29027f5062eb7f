"""Requests to a store through fsspec, each repeated a bounded number of times; and what their failures mean.

fsspec has one interface for object stores, and a package for each. They are imported only here, when an address is
used. fsspec's own settings apply (``FSSPEC_S3_...``, ``~/.config/fsspec``), and those of the package: credentials are
found as any other program finds them, and never stand in a recipe.

The packages repeat requests too, but not every kind of failure, and not for long. So here each request has four
attempts, with pauses of 1, 4 and 16 seconds. What another attempt cannot mend is not repeated: a file that is not
there, missing or refused credentials, a file that was changed meanwhile. A failure ends the preparation, which goes on
later from what is finished. It is never a reason to leave out a record.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megatron_vl.errors import DataError

Answer = TypeVar("Answer")

PACKAGES: Mapping[str, str] = {
    "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "oss": "ossfs", "hf": "huggingface_hub", "memory": "fsspec",
}  # fmt: skip
"""The protocols that are read, and the package that each needs. ``memory`` is a store in this process, for tests."""
_OPTIONS: Mapping[str, Mapping[str, Any]] = {"s3": {"max_concurrency": 1}}
"""s3fs would ask for the size of a file before it fetches it, to fetch parts at once. Other workers are at work."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds between attempts."""
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
_NO_CREDENTIALS = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError",
    "ClientAuthenticationError",
})  # fmt: skip
"""Names of the errors of botocore, google.auth and azure that mean it; their packages may not be installed."""
_CREDENTIALS: Mapping[str, str] = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; of a public bucket FSSPEC_S3_ANON=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS; of a public bucket FSSPEC_GS_TOKEN=anon",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "oss": "FSSPEC_OSS_KEY, FSSPEC_OSS_SECRET and OSS_ENDPOINT",
    "hf": "HF_TOKEN, for what is not public",
}


def open_store(protocol: str) -> Any:
    """Return fsspec's file system of a protocol. Raises DataError if a package is missing.

    It keeps no listing, so each question gets what is in the store now.
    """
    try:
        options = _OPTIONS.get(protocol, {})
        return importlib.import_module("fsspec").filesystem(protocol, use_listings_cache=False, **options)
    except ImportError as error:
        package = PACKAGES[protocol]
        extra = " or 'megatron_vl[remote]'" if package == "s3fs" else ""
        raise DataError(f"{protocol}:// addresses need {package}: pip install {package}{extra} ({error})") from error


def ask(address: str, request: Callable[[], Answer], doing: str) -> Answer:
    """Return the answer to a request about an address. ``doing`` says in messages what failed: "list it".

    Raises:
        OSError: There is no such file, or it is a folder, or it is not one.
        DataError: Credentials are missing or refused, or all attempts failed.
    """
    for pause in (*PAUSES, None):
        try:
            return request()
        except (*_FINAL, *_BUGS, DataError):
            raise
        except Exception as error:
            if explained := _explained(error, address, address.partition(":")[0]):
                raise explained from error
            if pause is None:
                raise DataError(
                    f"{address}: cannot {doing}, in {len(PAUSES) + 1} attempts ({_said(error)}). Mend the connection "
                    "and start again: it goes on from what is finished. Or copy the files to a disk"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def changed(address: str) -> DataError:
    """Return the error for a file that is no longer the one for which the work was planned."""
    return DataError(f"{address}: was changed while it was read; start again when nobody writes there")


def _explained(error: Exception, address: str, protocol: str) -> DataError | None:
    """Return the error to raise at once; None if another attempt may succeed."""
    advice = _CREDENTIALS.get(protocol, "the credentials of this store")
    if type(error).__name__ in _NO_CREDENTIALS:
        return DataError(f"{address}: no usable credentials were found ({_said(error)}); set {advice}")
    if isinstance(error, PermissionError):
        return DataError(
            f"{address}: the store refuses access ({_said(error)}). The credentials must be valid and may list and "
            f"read there; they come from {advice}"
        )
    if type(error).__name__ == "FileExpired":  # s3fs: the tag is another than when the file was opened
        return changed(address)
    return None


def _said(error: Exception) -> str:
    """Return type and text of an error, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
