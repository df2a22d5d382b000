import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import retries, s3_files, storage
from pipeline.errors import ConfigError
from pipeline.storage import Storage, join
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.s3 import KEY, SECRET, S3Server

ATTEMPTS = 3  # instead of seven
QUICK = {"connect_timeout": 1, "read_timeout": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """An empty bucket, once through a proxy that can misbehave and once past it."""

    uri: str
    proxied: Storage
    direct: Storage
    proxy: FaultProxy

    def file(self, data: bytes = b"0123456789", *, name: str = "a") -> str:
        uri = join(self.uri, name)
        self.direct.overwrite(uri, data)
        return uri


@pytest.fixture(scope="module")
def proxy_of_all(s3_server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3_server.port, key=KEY, secret=SECRET) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket_of_all(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def bucket(
    s3_server: S3Server, proxy_of_all: FaultProxy, bucket_of_all: str, request: pytest.FixtureRequest
) -> Iterator[Bucket]:
    proxy_of_all.heal()
    yield Bucket(
        uri=f"s3://{bucket_of_all}/{hashlib.md5(request.node.name.encode()).hexdigest()}",
        proxied=Storage(s3_server.options(endpoint=proxy_of_all.endpoint, **QUICK)),
        direct=Storage(s3_server.options()),
        proxy=proxy_of_all,
    )
    proxy_of_all.heal()
    proxy_of_all.ignored_headers.clear()
    proxy_of_all.refused_headers.clear()


@pytest.fixture(autouse=True)
def quick_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_BACKOFF_SECONDS", (0.001,) * (ATTEMPTS - 1))
    s3_files._md5_buckets.clear()


def download(storage: Storage, uri: str) -> bytes:
    copy = BytesIO()
    storage.download(uri, copy)
    return copy.getvalue()


def read_open(storage: Storage, uri: str) -> bytes:
    with storage.open(uri) as file:
        return file.read()


def names(storage: Storage, uri: str) -> list[str]:
    return [entry.uri.removeprefix(uri) for entry in storage.list_files(uri)]


# What every public call must survive, and must report when it does not pass: a call on the file `a`, and its result.
CALLS: dict[str, tuple[Callable[[Storage, str], Any], Any]] = {
    "list_files": (lambda storage, uri: names(storage, uri.rpartition("/")[0]), ["/a"]),
    "list a glob": (lambda storage, uri: len(list(storage.list_files(uri + "*"))), 1),
    "stat": (lambda storage, uri: storage.stat(uri).size_bytes, 10),  # type: ignore[union-attr]
    "exists": (lambda storage, uri: storage.exists(uri), True),
    "is_folder": (lambda storage, uri: storage.is_folder(uri.rpartition("/")[0]), True),
    "open": (read_open, b"0123456789"),
    "read_bytes": (lambda storage, uri: storage.read_bytes(uri), b"0123456789"),
    "download": (download, b"0123456789"),
    "create": (lambda storage, uri: storage.create(uri + "/new", b"new"), True),
    "create again": (lambda storage, uri: storage.create(uri, b"other"), False),
    "overwrite": (lambda storage, uri: storage.overwrite(uri, b"9876543210"), None),
    "delete": (lambda storage, uri: storage.delete(uri), None),
    "probe": (lambda storage, uri: storage.probe(uri + "/folder").conditional_puts, True),
}
FAULTS: dict[str, dict[str, Any]] = {
    "503": {"kind": "answer"},
    "500": {"kind": "answer", "status": 500, "code": "InternalError"},
    "429": {"kind": "answer", "status": 429, "code": "TooManyRequests"},
    "throttled by code": {"kind": "answer", "status": 400, "code": "RequestLimitExceeded"},
    "reset": {"kind": "reset"},
    "answer lost": {"kind": "lose answer"},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_outlives_a_fault_that_passes(bucket: Bucket, call: str, fault: str) -> None:
    uri, (action, expected) = bucket.file(), CALLS[call]
    bucket.proxy.fail(**FAULTS[fault], times=ATTEMPTS - 1)
    assert action(bucket.proxied, uri) == expected
    assert [fault.times for fault in bucket.proxy.faults] == [0]
    if call == "create":
        assert bucket.direct.read_bytes(uri + "/new") == b"new"


@pytest.mark.parametrize("call", CALLS)
def test_every_call_ends_and_tells_when_a_fault_stays(bucket: Bucket, call: str) -> None:
    uri, (action, _) = bucket.file(), CALLS[call]
    bucket.proxy.fail("answer")
    with pytest.raises((OSError, ConfigError)) as caught:
        action(bucket.proxied, uri)
    assert uri.rpartition("/")[0] in str(caught.value)
    assert "(HTTP 503" in str(caught.value)
    assert "overloaded or failing; run again later" in str(caught.value)
    assert len(bucket.proxy.requests) % ATTEMPTS == 0


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
)
def test_no_call_repeats_what_cannot_pass(bucket: Bucket, call: str, status: int, code: str) -> None:
    uri, (action, _) = bucket.file(), CALLS[call]
    bucket.proxy.fail("answer", status=status, code=code)
    with pytest.raises((OSError, ConfigError), match="credentials"):
        action(bucket.proxied, uri)
    assert len(bucket.proxy.requests) == len(set(bucket.proxy.requests))


READS = {"open": read_open, "read_bytes": lambda storage, uri: storage.read_bytes(uri), "download": download}


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("kind", ["cut body", "reset body", "short answer", "flip a byte"])
def test_bytes_that_go_wrong_on_their_way_are_asked_for_again(bucket: Bucket, call: str, kind: Any) -> None:
    data = random.Random(0).randbytes(300_000)
    uri = bucket.file(data)
    bucket.proxy.fail(kind, method="GET", num_bytes=100_000, times=2)
    if (call, kind) == ("open", "flip a byte"):  # it hands out bytes as they come, so it can only say so at the end
        with pytest.raises(OSError, match="MD5"):
            READS[call](bucket.proxied, uri)
        bucket.proxy.heal()
    assert READS[call](bucket.proxied, uri) == data


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("kind", ["cut body", "short answer", "flip a byte"])
def test_bytes_that_stay_wrong_are_never_taken_for_right(bucket: Bucket, call: str, kind: Any) -> None:
    uri = bucket.file(random.Random(0).randbytes(300_000))
    bucket.proxy.fail(kind, method="GET", num_bytes=100_000)
    with pytest.raises(OSError, match=uri):
        READS[call](bucket.proxied, uri)


_STALL_SECONDS = 45  # who waits for its end has waited for it; a busy machine is not as slow as that


@pytest.mark.parametrize("call", ["read_bytes", "download", "overwrite", "list_files", "create"])
@pytest.mark.parametrize("kind", ["stall", "stall body"])
def test_a_stall_is_not_waited_for(bucket: Bucket, call: str, kind: Any) -> None:
    uri, (action, expected) = bucket.file(), CALLS[call]
    bucket.proxy.fail(kind, times=1, seconds=_STALL_SECONDS)
    begun = time.monotonic()
    assert action(bucket.proxied, uri) == expected
    assert time.monotonic() - begun < _STALL_SECONDS


def test_a_body_that_trickles_has_a_bound_too(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of the whole request, with a read timeout that would wait for longer."""
    monkeypatch.setattr(s3_files, "_REQUEST_SECONDS", 0.7)
    uri = bucket.file()
    bucket.proxy.fail("stall", times=1, seconds=_STALL_SECONDS)
    begun = time.monotonic()
    options = bucket.proxied.options | {"config_kwargs": {"s3": {"addressing_style": "path"}}}
    assert Storage(options).read_bytes(uri) == b"0123456789"
    assert time.monotonic() - begun < _STALL_SECONDS


def test_no_attempt_begins_after_two_minutes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = bucket.file()
    bucket.proxied.exists(uri)
    bucket.proxy.heal()
    monkeypatch.setattr(retries, "_LAST_ATTEMPT_SECONDS", -1.0)
    bucket.proxy.fail("answer")
    with pytest.raises(OSError, match="HTTP 503 SlowDown"):
        bucket.proxied.read_bytes(uri)
    assert len(bucket.proxy.requests) == 1


def test_a_server_that_is_down_is_not_an_empty_bucket(s3_server: S3Server) -> None:
    down = Storage(s3_server.options(endpoint="http://127.0.0.1:9", **QUICK))
    for action in (down.exists, down.is_folder, down.read_bytes, lambda uri: list(down.list_files(uri))):
        with pytest.raises(OSError, match=r"s3://b/x: .*check the address \(endpoint_url\)") as caught:
            action("s3://b/x")
        assert not isinstance(caught.value, FileNotFoundError)


# --- creating


def test_a_put_whose_answer_was_lost_is_known_as_our_own(bucket: Bucket) -> None:
    uri = join(bucket.uri, "part")
    bucket.proxy.fail("lose answer", method="PUT", times=1)
    assert bucket.proxied.create(uri, b"ours")
    assert bucket.proxy.count("^PUT") == 2
    assert bucket.direct.read_bytes(uri) == b"ours"


def test_equal_bytes_of_somebody_else_are_not_our_own(bucket: Bucket) -> None:
    uri = bucket.file(b"the same")
    bucket.proxy.fail("reset", method="PUT", times=1)
    assert not bucket.proxied.create(uri, b"the same")


def test_a_put_that_was_overtaken_before_its_repetition_is_lost(bucket: Bucket) -> None:
    uri = join(bucket.uri, "part")
    bucket.proxy.fail("reset", method="PUT", times=1)
    assert bucket.direct.create(uri, b"theirs")
    assert not bucket.proxied.create(uri, b"ours")
    assert bucket.direct.read_bytes(uri) == b"theirs"


@pytest.mark.parametrize("seed", range(2))
def test_of_eight_writers_on_a_bad_network_exactly_one_creates(bucket: Bucket, seed: int) -> None:
    chance, uri = random.Random(seed), join(bucket.uri, f"race-{seed}")
    for _ in range(12):
        bucket.proxy.fail(chance.choice(["lose answer", "reset", "answer"]), method="PUT|HEAD", times=1)
    storage = Storage(bucket.proxied.options | {"config_kwargs": {"s3": {"addressing_style": "path"}}})
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return storage.create(uri, bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(write, range(8)))
    assert sum(results) == 1
    assert bucket.direct.read_bytes(uri) == bytes([results.index(True)])


def test_bytes_that_go_wrong_while_they_are_put_are_put_again(bucket: Bucket) -> None:
    """No checksum reaches the store, as with one that knows none: it says what it holds, and that is looked at."""
    for write in (bucket.proxied.create, bucket.proxied.overwrite):
        uri = join(bucket.uri, f"part-{write.__name__}")
        bucket.proxy.fail("flip a sent byte", method="PUT", times=2)
        assert write(uri, b"0123456789" * 100) is not False
        assert bucket.direct.read_bytes(uri) == b"0123456789" * 100
        assert bucket.proxy.faults[-1].times == 0


def test_a_put_that_stays_wrong_leaves_nothing_that_looks_right(bucket: Bucket) -> None:
    uri = join(bucket.uri, "part")
    bucket.proxy.fail("flip a sent byte", method="PUT")
    with pytest.raises(OSError, match=f"{uri}: the store took 10 bytes and holds others"):
        bucket.proxied.create(uri, b"0123456789")
    assert not bucket.direct.exists(uri)


# --- stores that cannot refuse


@pytest.mark.parametrize("kind", ["ignored_headers", "refused_headers"])
def test_a_store_without_conditions_is_found_out_and_used_without(
    bucket: Bucket, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    getattr(bucket.proxy, kind).add("if-none-match")
    found = bucket.proxied.probe(bucket.uri)
    assert not found.conditional_puts
    assert found.options == bucket.proxied.options
    (warning,) = [record.getMessage() for record in caplog.records]
    assert bucket.uri in warning
    assert "start only one at a time" in warning
    assert not bucket.direct.is_folder(bucket.uri)
    assert found.probe(bucket.uri) is not None
    assert len(caplog.records) == 1  # not again
    uri = join(bucket.uri, "part")
    assert found.create(uri, b"first")
    assert not found.create(uri, b"second")
    assert found.read_bytes(uri) == b"first"
    bucket.proxy.fail("lose answer", method="PUT", times=1)
    assert found.create(uri + "2", b"once")


def test_a_probe_takes_few_requests(bucket: Bucket) -> None:
    bucket.proxied.probe(bucket.uri)
    assert len(bucket.proxy.requests) <= 6


def test_a_bucket_that_is_missing_cannot_be_written_to(bucket: Bucket) -> None:
    with pytest.raises(ConfigError, match=r"cannot write to s3://missing/x: .*create the bucket first"):
        bucket.proxied.probe("s3://missing/x")
    with pytest.raises(ConfigError, match="the name of the bucket has to be written out"):
        list(bucket.proxied.list_files("s3://*/x"))


# --- listing


def test_a_listing_is_read_page_by_page_and_each_is_tried_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_files, "_PAGE_KEYS", 10)
    for number in range(35):
        bucket.file(b"", name=f"{number:02d}.wav")
    bucket.proxy.fail("reset", path="max-keys=10", times=ATTEMPTS - 1)
    bucket.proxy.fail("answer", path="continuation-token", times=ATTEMPTS - 1)
    assert names(bucket.proxied, bucket.uri) == [f"/{number:02d}.wav" for number in range(35)]
    assert bucket.proxy.count("max-keys=10") == 4 + 2 * (ATTEMPTS - 1)
    bucket.proxy.heal()
    assert len(list(bucket.proxied.list_files(join(bucket.uri, "0*.wav")))) == 10
    assert bucket.proxy.count("max-keys=10") == 1  # the part of the glob that is no pattern is asked for


class Pages:
    """As much of a connection as listing takes."""

    def __init__(self, keys: list[str], *, server: str) -> None:
        self.keys, self.server, self.num_asked = keys, server, 0

    def ask(self, fs: Any, method: str, **asked: Any) -> Any:
        if method == "head_object":
            raise FileNotFoundError
        self.num_asked += 1
        start = int(asked.get("ContinuationToken", 0))
        found = self.keys[start : start + 10]
        return {
            "Contents": [{"Key": key, "Size": 1, "ETag": '"x"'} for key in found],
            "IsTruncated": start + 10 < len(self.keys),
            "NextContinuationToken": str(start + 10),
            "ResponseMetadata": {"HTTPHeaders": {"server": self.server}},
        }


def test_pages_are_asked_for_as_they_are_needed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages([f"in/{number:04d}" for number in range(1000)], server="AmazonS3")
    monkeypatch.setattr(s3_files, "_ask", pages.ask)
    listing = bucket.direct.list_files("s3://b/in")
    for _ in range(15):
        next(listing)
    assert pages.num_asked == 3  # one of them asked whether it is a folder
    assert len(list(listing)) == 985


def test_a_store_that_lists_by_folder_is_put_in_order(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"in/{name}" for name in ("a/z", "a!", "a-b", "a.wav", "b")]
    for server, name in (("SeaweedFS 4", "b"), ("", "b--x-s3")):
        monkeypatch.setattr(s3_files, "_ask", Pages(keys, server=server).ask)
        found = [entry.uri for entry in bucket.direct.list_files(f"s3://{name}/in")]
        assert found == sorted(f"s3://{name}/{key}" for key in keys)
    monkeypatch.setattr(s3_files, "_ask", Pages(keys, server="nginx").ask)
    with pytest.raises(OSError, match=r"s3://b/in/a!: listed after s3://b/in/a/z"):
        list(bucket.direct.list_files("s3://b/in"))


@pytest.mark.parametrize("name", ["?versionId=3", "a+b c%20&=#.wav", "é/😀.wav", "~", "'\"<>"])
def test_names_mean_themselves(bucket: Bucket, name: str) -> None:
    """s3fs reads `?versionId=` as something else."""
    uri = bucket.file(name.encode(), name=name)
    assert bucket.proxied.read_bytes(uri) == name.encode()
    assert [entry.uri for entry in bucket.proxied.list_files(bucket.uri)] == [uri]


def test_the_marker_of_a_folder_is_no_file(bucket: Bucket, s3_server: S3Server) -> None:
    name, _, key = bucket.uri.partition("://")[2].partition("/")
    fs = fsspec.filesystem("s3", **s3_server.options())
    fs.call_s3("put_object", Bucket=name, Key=f"{key}/folder/", Body=b"")
    bucket.file(name="folder/a")
    assert names(bucket.proxied, bucket.uri) == ["/folder/a"]


def test_an_empty_bucket_is_a_folder_without_files(s3_server: S3Server) -> None:
    there = Storage(s3_server.options())
    assert there.is_folder(name := f"s3://{s3_server.new_bucket()}")
    assert list(there.list_files(name)) == []
    assert there.stat(name) is None
    assert not there.is_folder("s3://missing-bucket")


# --- what is read is what is there


def test_a_file_that_changes_while_it_is_read_is_noticed(bucket: Bucket) -> None:
    uri = bucket.file(b"a" * 1_000_000)
    with bucket.proxied.open(uri) as file:
        file.read(10)
        bucket.file(b"b" * 1_000_000)
        with pytest.raises(OSError, match="it changed while it was read"):
            file.seek(900_000) and file.read()
    with bucket.proxied.open(uri) as file:
        file.read(10)
        bucket.file(b"b")
        with pytest.raises(OSError, match="it changed while it was read"):
            file.seek(900_000) and file.read()


def test_rest_of_an_open_file_is_few_requests(bucket: Bucket) -> None:
    """Python's own way to read all of a file asked for 8 kB at a time."""
    uri = bucket.file(b"a" * 3_000_000)
    assert len(read_open(bucket.proxied, uri)) == 3_000_000
    assert len(bucket.proxy.requests) <= 4


def test_a_file_in_pieces_is_the_same(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PIECE_BYTES", 1000)
    data = random.Random(2).randbytes(12_345)
    uri = bucket.file(data)
    assert download(bucket.proxied, uri) == data
    assert read_open(bucket.proxied, uri) == data
    bucket.proxy.fail("flip a byte", method="GET", times=1)
    assert download(bucket.proxied, uri) == data


def test_an_object_put_in_parts_has_no_md5_and_is_read_all_the_same(bucket: Bucket, s3_server: S3Server) -> None:
    name, _, key = bucket.uri.partition("://")[2].partition("/")
    fs, data = fsspec.filesystem("s3", **s3_server.options()), random.Random(3).randbytes(6 * 2**20)
    where = {"Bucket": name, "Key": key}
    upload = fs.call_s3("create_multipart_upload", **where)["UploadId"]
    parts = [
        {
            "PartNumber": number,
            "ETag": fs.call_s3("upload_part", **where, UploadId=upload, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate((data[: 5 * 2**20], data[5 * 2**20 :]), start=1)
    ]
    fs.call_s3("complete_multipart_upload", **where, UploadId=upload, MultipartUpload={"Parts": parts})
    for read in READS.values():
        assert read(bucket.proxied, bucket.uri) == data
    bucket.proxy.fail("short answer", num_bytes=1000, method="GET")
    for read in READS.values():
        with pytest.raises(OSError, match=r"asked for bytes|MD5|got"):
            read(bucket.proxied, bucket.uri)


def test_etags_that_only_look_like_an_md5_are_found_out(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = bucket.file()
    monkeypatch.setattr(s3_files, "_md5_of_etag", lambda bucket, answer: "0" * 32)
    for read in READS.values():
        s3_files._md5_buckets.clear()
        assert read(bucket.proxied, uri) == b"0123456789"
    assert bucket.proxied.create(uri + "-new", b"new")
    bucket.proxied.overwrite(uri, b"new")
    assert all("its ETag is not the MD5" in record.getMessage() for record in caplog.records)
    s3_files._md5_buckets.add(s3_files.split(uri)[0])  # here others were: so this one is damaged
    for read in READS.values():
        with pytest.raises(OSError, match="its content has MD5"):
            read(bucket.proxied, uri)


# --- credentials


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return tmp_path


WAYS_IN = ["options", "client_kwargs", "environment", "environment of S3", "profile", "profile by name"]


@pytest.mark.parametrize("way", WAYS_IN)
def test_credentials_come_the_ways_people_know(
    way: str, bucket: Bucket, s3_server: S3Server, no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, path_style = bucket.file(), {"config_kwargs": {"s3": {"addressing_style": "path"}}}
    (no_credentials / "credentials").write_text(f"[p]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    options: dict[str, Any] = {}
    if way == "options":
        options = {"key": KEY, "secret": SECRET, "endpoint_url": s3_server.endpoint}
    elif way == "client_kwargs":
        client = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "endpoint_url": s3_server.endpoint}
        options = {"client_kwargs": client}
    elif way == "profile by name":
        options = {"profile": "p", "endpoint_url": s3_server.endpoint}
    else:
        monkeypatch.setenv(
            "AWS_ENDPOINT_URL_S3" if way == "environment of S3" else "AWS_ENDPOINT_URL", s3_server.endpoint
        )
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        if way == "profile":
            monkeypatch.setenv("AWS_PROFILE", "p")
        else:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert Storage(options | path_style).read_bytes(uri) == b"0123456789"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
        ({"profile": "nobody"}, "set AWS_ACCESS_KEY_ID"),
        ({"key": "nobody", "secret": "hush-hush"}, "credentials"),
        ({"key": KEY, "secret": "hush-hush"}, "credentials"),
        ({"anon": True}, "give these credentials the right to it"),
    ],
)
def test_credentials_that_do_not_open_the_door_are_told_without_saying_them(
    options: dict[str, Any], said: str, bucket: Bucket, s3_server: S3Server, no_credentials: Path
) -> None:
    where = {"endpoint_url": s3_server.endpoint, "client_kwargs": {"region_name": "us-east-1"}}
    refused = Storage(where | options)
    for call in (refused.read_bytes, lambda uri: list(refused.list_files(uri)), lambda uri: refused.create(uri, b"")):
        with pytest.raises(OSError, match=said) as caught:
            call(bucket.uri)
        assert "hush" not in str(caught.value)
        assert bucket.uri in str(caught.value)


SECRETS = ["AKIAEXAMPLE", "hush/hush+hush=", "sesame-token"]


@pytest.mark.parametrize("where", ["options", "environment"])
def test_no_secret_is_ever_shown(
    where: str,
    bucket: Bucket,
    no_credentials: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Even where a server repeats them in its answer."""
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {
        "endpoint_url": bucket.proxy.endpoint.replace("//", "//ali:baba-cave@"),
        "config_kwargs": QUICK,
    }
    if where == "options":
        options |= dict(zip(("key", "secret", "token"), SECRETS, strict=True))
    else:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        for name, value in zip(names, SECRETS, strict=True):
            monkeypatch.setenv(name, value)
    for status, code in ((503, "SlowDown"), (403, "AccessDenied"), (400, "ExpiredToken")):
        bucket.proxy.heal()
        bucket.proxy.fail("answer", status=status, code=code, message=f"{' '.join(SECRETS)} at ali:baba-cave@here")
        asked = Storage(options)
        texts = [repr(asked)]
        for call in ("list_files", "read_bytes", "create", "probe"):
            with pytest.raises((OSError, ConfigError)) as caught:
                CALLS[call][0](asked, bucket.uri + "/a")
            texts += [str(caught.value), repr(caught.value)]
        shown = "\n".join([*texts, caplog.text])
        assert not [secret for secret in [*SECRETS, "baba-cave"] if secret in shown]
