"""Objects on S3 and its kin, one request at a time and each with a bound: what `Storage` does for `s3://`.

The connection is s3fs's, because its options are the ones people know; its files are not used. They collect a listing
before they show it, take `?versionId=` in a name for more than a name, and believe whatever bytes arrive.
"""

import asyncio
import hashlib
import logging
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fsspec.asyn import sync

from pipeline.errors import ConfigError
from pipeline.listing import FileEntry, has_glob
from pipeline.retries import DamagedInTransit, answer_of, shown

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_REQUEST_SECONDS = 45.0  # of one request, beside the time its bytes need; conditional puts queue on some stores
_BYTES_PER_SECOND = 1_000_000  # slower than any link worth running on
_MAX_KEY_BYTES = 1024
_PAGE_KEYS = 1000  # as many as S3 gives
_WRITER_KEY = "kikitori-writer"  # user metadata that names who created an object
_MD5 = re.compile(r'"?([0-9a-f]{32})"?', re.IGNORECASE)
# Where the ETag of one object was seen to be the MD5 of its content, so that those of the others are too.
_md5_buckets: set[str] = set()

DEFAULT_CONFIG: Mapping[str, Any] = {
    "retries": {"total_max_attempts": 1},
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,
    # Every store knows Content-MD5, which is sent instead; many stumble over the trailing checksums of newer clients.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a listing."""

    entries: tuple[FileEntry, ...]
    next_page: str  # empty after the last
    is_ordered: bool  # as far as the store is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of an object, and what the store says of the whole."""

    data: bytes
    md5: str | None  # of the whole object; None where its ETag is something else


class Trust:
    """Decides whether bytes are what the store holds, by the MD5 that most ETags are.

    Some stores have ETags that only look like one. So what was read twice the same is believed after all, but only
    where no ETag was ever seen to be an MD5.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._bucket = split(uri)[0]
        self._seen: set[str] = set()

    def check(self, found: str, expected: str | None) -> None:
        """Compare the MD5 of what was read with what the ETag says.

        Raises:
            DamagedInTransit: they differ.
        """
        if expected is None:
            return
        if found == expected:
            _md5_buckets.add(self._bucket)
        elif found in self._seen and self._bucket not in _md5_buckets:
            logger.warning(
                "%s: its ETag is not the MD5 of its content, so only its length is checked", shown(self._uri)
            )
        else:
            self._seen.add(found)
            raise DamagedInTransit(f"its content has MD5 {found}, and its ETag says {expected}")


def split(uri: str) -> tuple[str, str]:
    """Bucket and key. The bucket may be the ARN of an access point.

    Raises:
        ConfigError: there is no bucket, or it is a pattern.
        FileNotFoundError: the key is longer than any can be.
    """
    path = uri.partition("://")[2]
    if path.startswith("arn:"):
        kind, name, *rest = path.split("/")
        bucket, key = f"{kind}/{name}", "/".join(rest)
    else:
        bucket, _, key = path.partition("/")
    if not bucket or has_glob(bucket):
        raise ConfigError(f"{shown(uri)}: the name of the bucket has to be written out, as in s3://bucket/folder")
    if len(key.encode("utf-8", "surrogateescape")) > _MAX_KEY_BYTES:
        raise FileNotFoundError(f"its key is longer than the {_MAX_KEY_BYTES} bytes that S3 allows")
    return bucket, key


def stat(fs: Any, uri: str) -> FileEntry:
    """Raises FileNotFoundError where there is no object of exactly this key."""
    bucket, key = split(uri)
    if not key:
        raise FileNotFoundError("a bucket is not a file")
    answer = _head(fs, bucket, key)
    return FileEntry(uri=uri, size_bytes=answer["ContentLength"], version=_version(answer))


def is_folder(fs: Any, uri: str) -> bool:
    """Whether any key lies below; a bucket is a folder even if it is empty. Raises FileNotFoundError without bucket."""
    bucket, key = split(uri)
    answer = _ask(fs, "list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
    return not key or bool(answer.get("Contents"))


def list_page(fs: Any, prefix_uri: str, page: str) -> Page:
    """The next keys that start as `prefix_uri` does; `page` is empty at first, then the last's `next_page`."""
    protocol = prefix_uri.partition("://")[0]
    bucket, prefix = split(prefix_uri)
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE_KEYS}
    if page:
        asked["ContinuationToken"] = page
    answer = _ask(fs, "list_objects_v2", **asked)
    entries = tuple(
        FileEntry(uri=f"{protocol}://{bucket}/{found['Key']}", size_bytes=found["Size"], version=_version(found))
        for found in answer.get("Contents", ())
        if not found["Key"].endswith("/")  # markers of folders that some S3 consoles leave behind
    )
    server = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("server", "")
    return Page(
        entries=entries,
        next_page=answer["NextContinuationToken"] if answer.get("IsTruncated") else "",
        # SeaweedFS lists folder by folder; directory buckets list in no order.
        is_ordered="seaweedfs" not in server.lower() and not _is_directory_bucket(bucket),
    )


def get(fs: Any, uri: str, *, start: int = 0, end: int | None = None, version: str = "") -> Piece:
    """The bytes from `start` to before `end`; with `version`, only if that is the object's still.

    Raises:
        DamagedInTransit: fewer or more bytes came than were promised.
        OSError: the object has changed.
    """
    bucket, key = split(uri)
    asked: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if end is not None:
        asked["Range"] = f"bytes={start}-{end - 1}"
    if version:
        asked["IfMatch"] = f'"{version}"'

    async def read() -> Piece:
        async with asyncio.timeout(_REQUEST_SECONDS) as bound:
            answer = await fs._call_s3("get_object", **asked)
            length = int(answer["ContentLength"])
            bound.reschedule(asyncio.get_running_loop().time() + _seconds(length))
            async with answer["Body"] as body:
                data = await body.read()
        if len(data) != (length if end is None else end - start):
            raise DamagedInTransit(f"asked for bytes {start} to {'the end' if end is None else end}, got {len(data)}")
        return Piece(data=data, md5=_md5_of_etag(bucket, answer))

    try:
        return _run(fs, read)
    except OSError as error:
        if answer_of(error)[1] in (412, 416):
            raise OSError("it changed while it was read; leave inputs alone during a run, and run again") from None
        raise


def put(fs: Any, uri: str, data: bytes, *, creator: str = "") -> None:
    """One put of all the bytes, with their MD5; with `creator`, only where nothing is yet, and marked with that name.

    Raises:
        DamagedInTransit: the store took something else for it.
        OSError: answered 412, because something is there.
    """
    bucket, key = split(uri)
    digest = hashlib.md5(data, usedforsecurity=False)
    condition = {"IfNoneMatch": "*", "Metadata": {_WRITER_KEY: creator}} if creator else {}
    sent = {"Body": data, "ContentMD5": b64encode(digest.digest()).decode()}
    answer = _ask(fs, "put_object", Bucket=bucket, Key=key, **sent, **condition, num_bytes=len(data))
    said = _md5_of_etag(bucket, answer)
    if said == digest.hexdigest():
        _md5_buckets.add(bucket)
    elif said is not None and get(fs, uri).data != data:
        if creator:
            delete(fs, uri)
        raise DamagedInTransit(f"the store took {len(data)} bytes and holds others")


def creator_of(fs: Any, uri: str) -> str:
    """What `put` was given when this object was created; empty if that is not known."""
    bucket, key = split(uri)
    return str(_head(fs, bucket, key).get("Metadata", {}).get(_WRITER_KEY, ""))


def delete(fs: Any, uri: str) -> None:
    """Remove an object, if there is one."""
    bucket, key = split(uri)
    _ask(fs, "delete_object", Bucket=bucket, Key=key)


def _head(fs: Any, bucket: str, key: str) -> Any:
    try:
        return _ask(fs, "head_object", Bucket=bucket, Key=key)
    except OSError as error:
        if answer_of(error)[1] not in (400, 403):
            raise
    # An answer without a body, so without a reason. Ask for one that has it; should that do, the reason was passing.
    _ask(fs, "get_object", Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
    return _ask(fs, "head_object", Bucket=bucket, Key=key)


def _ask(fs: Any, method: str, *, num_bytes: int = 0, **arguments: Any) -> Any:
    async def ask() -> Any:
        async with asyncio.timeout(_seconds(num_bytes)):
            return await fs._call_s3(method, **arguments)

    return _run(fs, ask)


def _run(fs: Any, action: Callable[[], Awaitable[_T]]) -> _T:
    """On the thread of fsspec's event loop; its bound is the action's own."""
    return cast(_T, sync(fs.loop, action))


def _seconds(num_bytes: int) -> float:
    return _REQUEST_SECONDS + num_bytes / _BYTES_PER_SECOND


def _version(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _md5_of_etag(bucket: str, answer: Mapping[str, Any]) -> str | None:
    """The MD5 of the whole object, unless it was put in parts or is encrypted with a key of its own."""
    match = _MD5.fullmatch(str(answer.get("ETag", "")))
    is_encrypted = "SSECustomerAlgorithm" in answer or "kms" in str(answer.get("ServerSideEncryption", ""))
    return match[1].lower() if match and not is_encrypted and not _is_directory_bucket(bucket) else None


def _is_directory_bucket(bucket: str) -> bool:
    return bucket.endswith("--x-s3")
