"""Faults of remote stores: which ones pass by themselves, how often to try again, how to tell them without secrets."""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast
from urllib.parse import quote, quote_plus

_T = TypeVar("_T")
# Seven attempts in about 16 s: outlasts throttling and the restart of a gateway, not an outage.
_BACKOFF_SECONDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_LAST_ATTEMPT_SECONDS = 120.0  # none begins later than this; each has a bound of its own, so the whole has one
_FINAL_5XX = frozenset({501, 505, 507, 511})  # not implemented, wrong version, full, not logged in
_TRANSIENT_4XX = frozenset({408, 409, 425, 429})  # 409: two conditional puts met; S3 says try again
_TRANSIENT_CODE_NAMES = """
    RequestTimeout SlowDown BadDigest IncompleteBody XAmzContentSHA256Mismatch InternalError ServiceUnavailable
    Throttling ThrottlingException ThrottledException RequestThrottled RequestThrottledException RequestLimitExceeded
    TooManyRequestsException BandwidthLimitExceeded PriorRequestNotComplete OperationAborted
"""
_TRANSIENT_CODES = frozenset(_TRANSIENT_CODE_NAMES.split())
_PUBLIC_OPTIONS = frozenset({"endpoint_url", "region_name", "signature_version", "addressing_style"})  # never secrets
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
_SECRET_PARAMETER = re.compile(
    r"(?i)(?<=[?&;])([^=&;#]*(?:sig|token|key|secret|passw|credential|auth)[^=&;#]*)=[^&;#]+"
)
_USER_IN_URI = re.compile(r"^([\w+.-]+://)[^/?#]*@")
_KINDS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, TimeoutError)
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or key and secret, or profile in storage_options "
    "(anon: true for a public bucket)"
)
_ADVICE_BY_CODE = {
    "ExpiredToken": "get new credentials and run again; what is committed stays",
    "ExpiredTokenException": "get new credentials and run again; what is committed stays",
    "TokenRefreshRequired": "get new credentials and run again; what is committed stays",
    "InvalidAccessKeyId": f"correct the credentials: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"correct the credentials: {_CREDENTIALS}",
    "InvalidToken": f"correct the credentials: {_CREDENTIALS}",
    "RequestTimeTooSkewed": "correct the clock of this machine",
    "NoSuchBucket": "create the bucket first, or correct its name",
    "PermanentRedirect": "set client_kwargs: {region_name: ...} in storage_options to the bucket's region",
    "AuthorizationHeaderMalformed": "set client_kwargs: {region_name: ...} in storage_options to the bucket's region",
    "InvalidObjectState": "restore it from the archive first",
    "QuotaExceeded": "free some space there; what is committed stays",
}


class DamagedInTransit(OSError):
    """What arrived is not what was sent; it is worth asking again."""


class NotImplementedByStore(OSError):
    """The store does not know what it was asked for, a conditional put for instance."""


def with_retries(action: Callable[[], _T]) -> _T:
    """The result of `action`, tried again while it fails for a reason that may pass; then its last error."""
    begun = time.monotonic()
    for pause_seconds in _BACKOFF_SECONDS:
        try:
            return action()
        except remote_errors() as error:
            if not _is_transient(error) or time.monotonic() - begun > _LAST_ATTEMPT_SECONDS:
                raise
        time.sleep(pause_seconds * random.uniform(0.5, 1.5))  # jitter: many workers are throttled at the same moment
    return action()


@functools.cache
def remote_errors() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise. Imported once something failed: botocore takes 0.2 s, local runs need none."""
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError, *_broken_connections())


def as_os_error(error: Exception, uri: str, *, options: Mapping[str, Any]) -> OSError:
    """The same fault as the nearest builtin `OSError`: which URI, what happened, what to do, and no secret."""
    code, status = answer_of(error)
    told = (isinstance(error, OSError) and error.strerror) or str(error) or _name(error)
    detail = " ".join(told.split()).replace(uri, shown(uri))
    answer = f" (HTTP {status} {code})".replace(" )", ")") if status is not None else ""
    text = f"{shown(uri)}: {without_secrets(detail, options=options)}{answer}; {_advice(error)}"
    # s3fs reports a lost race as a plain OSError where the server does not name the condition that failed.
    if status == 412:
        return FileExistsError(text)
    if status == 501 or code == "NotImplemented":
        return NotImplementedByStore(text)
    if status in (401, 403):
        return PermissionError(text)
    if status in (404, 410):
        return FileNotFoundError(text)
    return next((kind for kind in (*_KINDS, DamagedInTransit) if isinstance(error, kind)), OSError)(text)


def shown(uri: str) -> str:
    """A URI as it may be shown: without the password before the host, or what signs a presigned link."""
    return _SECRET_PARAMETER.sub(r"\1=***", _USER_IN_URI.sub(r"\1***@", uri))


def without_secrets(text: str, *, options: Mapping[str, Any]) -> str:
    """A text with every secret of the options and of the environment blotted out."""
    secrets = {*_secrets(options), *filter(None, map(os.environ.get, _SECRET_VARIABLES))}
    spellings = {spelling for secret in secrets for spelling in (secret, quote(secret, safe=""), quote_plus(secret))}
    for secret in sorted(spellings, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def answer_of(error: BaseException) -> tuple[str, int | None]:
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


@functools.cache
def _broken_connections() -> tuple[type[Exception], ...]:
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError  # some throttling answers are not the XML they should be

    ours = (DamagedInTransit, TimeoutError, ConnectionError)
    return (*ours, HttpError, NoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError)


def _is_transient(error: Exception) -> bool:
    code, status = answer_of(error)
    if code in _TRANSIENT_CODES:
        return True
    if status is not None:
        return status in _TRANSIENT_4XX or (500 <= status < 600 and status not in _FINAL_5XX)
    return isinstance(error, _broken_connections())


def _name(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _advice(error: Exception) -> str:
    """What the user can do about it."""
    code, status = answer_of(error)
    if code in _ADVICE_BY_CODE:
        return _ADVICE_BY_CODE[code]
    if "redential" in type(error).__name__ or "Profile" in type(error).__name__ or "SSO" in type(error).__name__:
        return _CREDENTIALS
    if status in (401, 403) or isinstance(error, PermissionError):
        return "give these credentials the right to it, or use others"
    if status == 404 or isinstance(error, FileNotFoundError):
        return "check its spelling"
    if _is_transient(error):
        if status is None:
            return "tried again in vain: check the address (endpoint_url), the network and the store, then run again"
        return "tried again in vain: the store is overloaded or failing; run again later"
    return "check the address, the credentials and the options"


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
