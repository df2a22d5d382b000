"""Files that name inputs, line by line: NeMo manifests (JSON lines) and plain lists of URIs.

A line that cannot be understood is not skipped, and does not stop a corpus of ten million others: it comes out as a
`BadLine` and gets an error row that names file and line. The first line alone decides whether this is a manifest at
all; where it is not, the user has named the wrong file and hears of it at once.
"""

import hashlib
import json
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from pipeline.errors import ConfigError
from pipeline.storage import is_local, join, normalise

_BLOCK_BYTES = 4 * 1024 * 1024
_EXPECTED = '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 3.0} (offset and duration in seconds, optional)'
_SCHEMA = pa.schema([("audio_filepath", pa.string()), ("offset", pa.float64()), ("duration", pa.float64())])
_AS_OURS = pa_json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedAudio:
    """A recording that a line names, or a part of it."""

    uri: str
    start_seconds: float | None = None  # None: the whole recording
    duration_seconds: float | None = None  # None: not known, or to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that names nothing."""

    line: int  # from 1
    sha256: str  # of the line: what it is recognised by, wherever it stands
    reason: str


def manifest_lines(file: BinaryIO, uri: str) -> Iterator[NamedAudio | BadLine]:
    """The lines of a NeMo manifest; paths are relative to it, keys it does not know are ignored.

    Raises:
        ConfigError: its first line is not one of a manifest.
    """
    lines = _manifest_lines(file, uri.rpartition("/")[0])
    first = next(lines, None)
    if isinstance(first, BadLine):
        raise ConfigError(f"input.uris: {uri} is no manifest: line {first.line} {first.reason}; expected {_EXPECTED}")
    if first is not None:
        yield first
    yield from lines


def list_lines(file: BinaryIO, uri: str) -> Iterator[NamedAudio | BadLine]:
    """The lines of a list of URIs; paths are relative to it, `#` begins a comment line."""
    folder = uri.rpartition("/")[0]
    number = 0
    for block in _blocks(file):
        for line in block.splitlines():
            number += 1
            text = line.strip().decode("utf-8", "surrogateescape")
            if text and not text.startswith("#"):
                yield _resolved(folder, text) or _bad(line, number, "holds a character that no file name can hold")


def _manifest_lines(file: BinaryIO, folder: str) -> Iterator[NamedAudio | BadLine]:
    num_lines = 0
    for block in _blocks(file):
        table = _parse_fast(block)
        if table is None:
            lines = enumerate(block.split(b"\n"), num_lines + 1)
            yield from (_parse_line(line, folder, number) for number, line in lines if line.strip())
        else:
            for path, start, duration in zip(*(column.to_pylist() for column in table.columns), strict=True):
                yield _named(folder, path, start=start, duration=duration)
        num_lines += block.count(b"\n")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines, some megabytes at a time; the line ends are unified."""
    head = file.read(len(_BYTE_ORDER_MARK))
    pending = b"" if head == _BYTE_ORDER_MARK else head
    while data := file.read(_BLOCK_BYTES):
        block = pending + data + file.readline()
        pending = b""
        yield _unified(block)
    if pending:
        yield _unified(pending)


def _unified(block: bytes) -> bytes:
    return block.replace(b"\r\n", b"\n") if b"\r" in block else block


def _parse_fast(block: bytes) -> Any | None:
    """A table of path, start and duration if every line of the block is as it should be, else None.

    Ten times as fast as line by line, and all that a good manifest needs.
    """
    try:
        options = pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        table = pa_json.read_json(pa.BufferReader(block), read_options=options, parse_options=_AS_OURS)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))  # a blank one is for the careful way
    start, duration = (table[name].to_numpy() for name in ("offset", "duration"))  # NaN where there is none
    is_good = (
        table.num_rows == num_lines
        and not table["audio_filepath"].null_count
        and not (start < 0).any()
        and not (duration <= 0).any()
        and np.isfinite(start).sum() + table["offset"].null_count == num_lines
        and np.isfinite(duration).sum() + table["duration"].null_count == num_lines
    )
    return table if is_good and _can_be_names(table["audio_filepath"]) else None


def _can_be_names(column: Any) -> bool:
    try:
        paths: list[str] = column.to_pylist()
    except UnicodeDecodeError:
        return False
    return all(paths) and _can_be_name("".join(paths))


def _can_be_name(path: str) -> bool:
    """Whether there is a way to write it down: no zero byte, and no half of a character that is not a byte either."""
    try:
        return b"\0" not in path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def _parse_line(line: bytes, folder: str, number: int) -> NamedAudio | BadLine:
    try:
        found = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        return _bad(line, number, f"is not JSON ({error})")
    if not isinstance(found, dict):
        return _bad(line, number, f"is a JSON {type(found).__name__}, not an object")
    path, start, duration = found.get("audio_filepath"), found.get("offset"), found.get("duration")
    if not isinstance(path, str) or not path:
        keys = ", ".join(map(str, found)) or "none"
        return _bad(line, number, f"has {path!r} for its audio_filepath, expected a path; its keys are {keys}")
    if start is not None and not _is_seconds(start):
        return _bad(line, number, f"has the offset {start!r}; expected seconds, from 0")
    if duration is not None and not (_is_seconds(duration) and duration > 0):
        return _bad(line, number, f"has the duration {duration!r}; expected seconds, more than 0")
    named = _resolved(folder, path, start=start, duration=duration)
    return named or _bad(line, number, "names a file with a character that no file name can hold")


def _named(folder: str, path: str, *, start: float | None, duration: float | None) -> NamedAudio:
    named = _resolved(folder, path, start=start, duration=duration)
    assert named is not None  # `_parse_fast` looked for the characters that cannot be
    return named


def _resolved(
    folder: str, path: str, *, start: float | None = None, duration: float | None = None
) -> NamedAudio | None:
    """None where no file can have this name."""
    uri = _uri_of(folder, path)
    if uri is None:
        return None
    return NamedAudio(
        uri=uri,
        start_seconds=None if start is None else float(start),
        duration_seconds=None if duration is None else float(duration),
    )


@lru_cache(maxsize=1024)  # segments of one recording mostly come one after the other
def _uri_of(folder: str, path: str) -> str | None:
    return beside(folder, path) if _can_be_name(path) else None


def beside(folder: str, path: str) -> str:
    """The URI of a path that is written in a file of `folder`: relative to it, or absolute, or a URI of its own."""
    if "://" in path or path.startswith("/"):
        return normalise(path)
    if is_local(folder):
        return normalise(f"{folder}/{path}")
    # Object stores take `..` for a name.
    return join(folder, path) if "./" not in path else _above(folder, path)


def _above(folder: str, path: str) -> str:
    protocol, _, below = folder.partition("://")
    return normalise(f"{protocol}://{posixpath.normpath(f'{below}/{path}')}")


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _bad(line: bytes, number: int, reason: str) -> BadLine:
    return BadLine(line=number, sha256=hashlib.sha256(line).hexdigest(), reason=reason)
