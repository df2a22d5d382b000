"""Faults of remote stores: which ones pass by themselves, how often to try again, how to tell them without secrets."""

import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

_T = TypeVar("_T")
_BACKOFF_SECONDS = (0.25, 0.5, 1.0, 2.0, 4.0)  # six attempts in about 8 s: outlasts throttling, not an outage
_TRANSIENT_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})  # 409: two conditional puts met; S3 says try again
_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"})
_PUBLIC_OPTIONS = frozenset({"endpoint_url", "region_name", "signature_version", "addressing_style"})  # never secrets
_KINDS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, TimeoutError)


def with_retries(action: Callable[[], _T]) -> _T:
    """The result of `action`, tried again while it fails for a reason that may pass; then its last error."""
    for pause_seconds in _BACKOFF_SECONDS:
        try:
            return action()
        except remote_errors() as error:
            if not _is_transient(error):
                raise
        time.sleep(pause_seconds * random.uniform(0.5, 1.5))  # jitter: many workers are throttled at the same moment
    return action()


@functools.cache
def remote_errors() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise. Imported once something failed: botocore takes 0.2 s, local runs need none."""
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError, *_broken_connections())


def as_os_error(error: Exception, uri: str, *, options: Mapping[str, Any]) -> OSError:
    """The same fault as the nearest builtin `OSError`, naming `uri` and no secret from `options`."""
    detail = str(error) or type(error).__name__
    for secret in sorted(_secrets(options), key=len, reverse=True):
        detail = detail.replace(secret, "***")
    # s3fs reports a lost race as a plain OSError where the server does not name the condition that failed.
    if _answer(error)[1] == 412:
        return FileExistsError(f"{uri}: {detail}")
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
    return kind(f"{uri}: {detail}")


@functools.cache
def _broken_connections() -> tuple[type[Exception], ...]:
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError  # some throttling answers are not the XML they should be

    return (TimeoutError, ConnectionError, HttpError, NoConnectionError, HTTPClientError, ResponseParserError)


def _is_transient(error: Exception) -> bool:
    code, status = _answer(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    return isinstance(error, _broken_connections())


def _answer(error: Exception) -> tuple[str, int | None]:
    """Error code and HTTP status the server answered with, if it did; s3fs keeps them on the cause."""
    for candidate in (error, error.__cause__):
        response: Any = getattr(candidate, "response", None)
        if isinstance(response, dict):
            answer = cast(dict[str, Any], response)
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return str(answer.get("Error", {}).get("Code", "")), status
        status = getattr(candidate, "status", None)
        if isinstance(status, int):
            return "", status
    return "", None


def _secrets(options: Any, *, key: str = "") -> Iterator[str]:
    """Every text within the options but those known to be harmless; of an endpoint, what stands before the @."""
    if isinstance(options, Mapping):
        for name, value in cast(Mapping[str, Any], options).items():
            yield from _secrets(value, key=name)
    elif isinstance(options, (list, tuple)):
        for value in cast(Iterable[Any], options):
            yield from _secrets(value, key=key)
    elif isinstance(options, str) and options:
        if key not in _PUBLIC_OPTIONS:
            yield options
        elif "@" in options:
            yield options.rpartition("@")[0].rpartition("//")[2]
