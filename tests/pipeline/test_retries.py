from collections.abc import Callable

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
)
from s3fs.errors import translate_boto_error

from pipeline import retries
from pipeline.retries import DamagedInTransit, NotImplementedByStore, as_os_error, shown, with_retries


def answered(status: int, code: str) -> ClientError:
    """What botocore makes of a server's answer."""
    return ClientError(
        {"Error": {"Code": code, "Message": "so it is"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


TRANSIENT = [
    answered(503, "SlowDown"),
    answered(500, "InternalError"),
    answered(429, "TooManyRequests"),
    answered(409, "ConditionalRequestConflict"),
    answered(400, "RequestTimeout"),
    answered(400, "RequestLimitExceeded"),
    answered(520, "Unknown"),
    DamagedInTransit("other bytes"),
    ConnectTimeoutError(endpoint_url="http://x"),
    EndpointConnectionError(endpoint_url="http://x"),
    ClientPayloadError("half an answer"),
    ConnectionResetError("reset"),
    TimeoutError("no answer"),
]
FINAL = [
    answered(403, "AccessDenied"),
    answered(404, "NoSuchKey"),
    answered(412, "PreconditionFailed"),
    answered(400, "ExpiredToken"),
    answered(403, "RequestTimeTooSkewed"),
    answered(501, "NotImplemented"),
    answered(507, "InsufficientStorage"),
    NoCredentialsError(),
    FileNotFoundError("gone"),
    FileExistsError("there"),
    PermissionError("no"),
]


@pytest.fixture(autouse=True)
def pauses_seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", pauses.append)  # only time is faked
    return pauses


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


def raw_and_translated(error: Exception) -> list[Exception]:
    """s3fs raises some errors as botocore does and translates others; both must be understood."""
    return [error, translate_boto_error(error)] if isinstance(error, ClientError) else [error]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_tried_seven_times(error: Exception, pauses_seconds: list[float]) -> None:
    for shape in raw_and_translated(error):
        assert with_retries(failing(*[shape] * 6)) == "done"
        with pytest.raises(type(shape)):
            with_retries(failing(*[shape] * 7))
    assert 7 < sum(pauses_seconds[:6]) < 24


def test_no_attempt_begins_after_two_minutes(pauses_seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now_seconds = [0.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now_seconds[0])

    def action() -> None:
        now_seconds[0] += 50
        raise TimeoutError

    with pytest.raises(TimeoutError):
        with_retries(action)
    assert now_seconds[0] == 150  # the third one began at 100


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_cannot_pass_is_tried_once(error: Exception, pauses_seconds: list[float]) -> None:
    for shape in raw_and_translated(error):
        with pytest.raises(type(shape)):
            with_retries(failing(shape))
    assert pauses_seconds == []


def test_waits_grow_and_differ(pauses_seconds: list[float]) -> None:
    for _ in range(2):
        with_retries(failing(*[TimeoutError()] * 6))
    assert pauses_seconds[5] > pauses_seconds[0]
    assert pauses_seconds[:6] != pauses_seconds[6:]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered(404, "NoSuchKey"), FileNotFoundError),
        (answered(404, "NoSuchBucket"), FileNotFoundError),
        (answered(403, "AccessDenied"), PermissionError),
        (answered(412, "PreconditionFailed"), FileExistsError),
        (answered(403, "ExpiredToken"), PermissionError),
        (answered(501, "NotImplemented"), NotImplementedByStore),
        (answered(503, "SlowDown"), OSError),
    ],
    ids=repr,
)
def test_errors_keep_their_kind_and_name_the_uri(error: ClientError, kind: type[OSError]) -> None:
    found = as_os_error(translate_boto_error(error), "s3://bucket/key", options={})
    assert type(found) is kind
    assert str(found).startswith("s3://bucket/key: ")
    assert "so it is" in str(found)


def test_no_option_that_may_be_secret_is_shown() -> None:
    options = {
        "secret": "sesame",
        "client_kwargs": {"endpoint_url": "http://ali:baba@cave:80", "region_name": "east"},
        "list": ["forty"],
        "anon": False,
    }
    error = PermissionError("sesame at http://ali:baba@cave:80 in the east, forty thieves")
    found = str(as_os_error(error, "s3://b/k", options=options))
    assert found.startswith("s3://b/k: *** at http://***@cave:80 in the east, *** thieves; ")


def test_no_secret_of_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open/sesame")
    found = str(as_os_error(OSError("key=open%2Fsesame is open/sesame"), "s3://b/k", options={}))
    assert found.startswith("s3://b/k: key=*** is ***; ")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/a@b?c=d", "s3://bucket/a@b?c=d"),
        ("https://ali:baba@cave/x", "https://***@cave/x"),
        ("https://ali:b@ba@cave/x@y", "https://***@cave/x@y"),
        ("https://h/x?X-Amz-Signature=1&part=2&X-Amz-Security-Token=3", "https://h/x?X-Amz-Signature=***&part=2&X-Amz-Security-Token=***"),
        ("https://h/x?sv=2020&sig=abc%3D#t", "https://h/x?sv=2020&sig=***#t"),
        ("/local/a.wav", "/local/a.wav"),
    ],
)  # fmt: skip
def test_a_uri_is_shown_without_what_opens_the_door(uri: str, expected: str) -> None:
    assert shown(uri) == expected
    assert str(as_os_error(OSError(f"no answer from {uri}"), uri, options={})).startswith(
        f"{expected}: no answer from {expected}; "
    )


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (answered(403, "AccessDenied"), "give these credentials the right to it, or use others"),
        (answered(404, "NoSuchKey"), "check its spelling"),
        (answered(404, "NoSuchBucket"), "create the bucket first, or correct its name"),
        (answered(400, "ExpiredToken"), "get new credentials and run again"),
        (answered(403, "SignatureDoesNotMatch"), "correct the credentials"),
        (answered(301, "PermanentRedirect"), "region_name"),
        (answered(503, "SlowDown"), "overloaded or failing; run again later"),
        (NoCredentialsError(), "set AWS_ACCESS_KEY_ID"),
        (ProfileNotFound(profile="x"), "AWS_PROFILE"),
        (EndpointConnectionError(endpoint_url="http://x"), "check the address (endpoint_url), the network"),
        (TimeoutError(), "no answer in time; tried again in vain"),
    ],
    ids=repr,
)
def test_every_error_says_what_to_do(error: Exception, advice: str) -> None:
    for shape in raw_and_translated(error):
        assert advice in str(as_os_error(shape, "s3://b/k", options={}))
