from collections.abc import Callable

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, NoCredentialsError
from s3fs.errors import translate_boto_error

from pipeline import retries
from pipeline.retries import as_os_error, with_retries


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
def test_what_may_pass_is_tried_six_times(error: Exception, pauses_seconds: list[float]) -> None:
    for shape in raw_and_translated(error):
        assert with_retries(failing(*[shape] * 5)) == "done"
        with pytest.raises(type(shape)):
            with_retries(failing(*[shape] * 6))
    assert 3 < sum(pauses_seconds[:5]) < 12


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_cannot_pass_is_tried_once(error: Exception, pauses_seconds: list[float]) -> None:
    for shape in raw_and_translated(error):
        with pytest.raises(type(shape)):
            with_retries(failing(shape))
    assert pauses_seconds == []


def test_waits_grow_and_differ(pauses_seconds: list[float]) -> None:
    for _ in range(2):
        with_retries(failing(*[TimeoutError()] * 5))
    assert pauses_seconds[4] > pauses_seconds[0]
    assert pauses_seconds[:5] != pauses_seconds[5:]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered(404, "NoSuchKey"), FileNotFoundError),
        (answered(404, "NoSuchBucket"), FileNotFoundError),
        (answered(403, "AccessDenied"), PermissionError),
        (answered(412, "PreconditionFailed"), FileExistsError),
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
    assert found == "s3://b/k: *** at http://***@cave:80 in the east, *** thieves"
