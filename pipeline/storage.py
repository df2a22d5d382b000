"""Files by URI, whatever keeps them; connections of fsspec are made here and nowhere else.

Local paths and `file://` go straight to the operating system (`local_files`), because a whole-or-nothing create needs
`link` and `fsync`, which fsspec does not offer. On S3 the requests are ours (`s3_files`); everything else (`memory://`,
`https://`, ...) is reached through fsspec's files. Every call is retried here and nowhere else: the retries inside
botocore and s3fs are switched off, as theirs, times theirs, times ours would wait an hour for a dead endpoint. As it
is, a call on S3 that cannot succeed ends within three minutes, and a second more for every MB it moves.
"""

import hashlib
import io
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO, TypeVar

import fsspec

from pipeline import local_files, s3_files
from pipeline.errors import ConfigError
from pipeline.listing import FileEntry, Pattern, ascending, has_glob, in_order
from pipeline.retries import (
    DamagedInTransit,
    NotImplementedByStore,
    answer_of,
    as_os_error,
    remote_errors,
    shown,
    with_retries,
)

__all__ = ["FileEntry", "Storage", "has_glob", "is_local", "join", "normalise", "shown"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_READ_AHEAD_BYTES = 256 * 1024  # of small reads; a bigger one is a single request of its own size
_PIECE_BYTES = 16 * 2**20  # of one request when a whole file is fetched
_MAX_DOWNLOADS = 3  # of a file whose bytes turn out wrong at the end
_LEFTOVER_SECONDS = 24 * 3600.0  # temporary files this old are nobody's work any more
_HTTP_SECONDS = {"total": 300, "sock_connect": 10, "sock_read": 30}
_MEMORY_LOCK = threading.Lock()  # fsspec's memory store is one per process, and checks before it writes


def normalise(uri: str) -> str:
    """The one spelling of a URI: absolute plain paths for local files, no trailing slash; the protocol kept elsewhere.

    Raises:
        FileNotFoundError: the name holds a character that no file name can hold.
    """
    if "\0" in uri or not _is_encodable(uri):
        raise FileNotFoundError(f"{uri!r} holds a character that no file name can hold")
    protocol, separator, path = uri.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(uri))
    if protocol in ("file", "local"):
        return os.path.abspath(path)
    path = path.lstrip("/") if protocol == "memory" else path
    return f"{protocol}://{path.rstrip('/')}"


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, slashes between them."""
    return "/".join([normalise(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether this machine's file system holds it."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


@dataclass(frozen=True, slots=True)
class Storage:
    """Reads, lists and writes whole files. Holds options only, no connection, so it pickles and forks.

    Local paths raise what the operating system raises. Elsewhere a transient fault is retried; what remains raises
    `FileNotFoundError` where nothing is there and another `OSError` else, with the URI and without any secret.

    Args:
        options: handed to fsspec as they are (credentials, endpoint); never logged or shown.
        conditional_puts: whether the store can refuse to replace a file, as `probe` finds out. On one that cannot,
            `create` looks first and then writes, and of writers at the same moment the last one wins.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    conditional_puts: bool = True

    def list_files(self, uri: str) -> Iterator[FileEntry]:
        """The file, the files below the folder, or those the glob matches (`**` crosses folders), sorted by URI.

        They come as they are found, in memory that does not grow with their number, as `listing` says. Hidden files and
        folders (`.name`) are left out, unless the glob names them; links to folders are not followed.

        Raises:
            FileNotFoundError: nothing is there, and `uri` is not a glob. A glob without matches yields nothing.
        """
        uri = normalise(uri)
        if (entry := self.stat(uri)) is not None:
            yield entry
            return
        is_folder = self.is_folder(uri)
        if not is_folder and not has_glob(uri):
            raise FileNotFoundError(f"{shown(uri)}: no such file or folder")
        root, text = (uri, "**") if is_folder else self._split_glob(uri)
        pattern = Pattern(text)
        start = len(root.rstrip("/")) + 1
        yield from (entry for entry in self._walk(root, pattern) if pattern.wants(entry.uri[start:]))

    def stat(self, uri: str) -> FileEntry | None:
        """The file at exactly this URI; None where there is none, or a folder."""
        uri = normalise(uri)
        if is_local(uri):
            status = local_files.stat_file(uri)
            return _local_entry(uri, status) if status is not None else None
        try:
            if _is_s3(uri):
                return self._call(uri, lambda fs, path: s3_files.stat(fs, path))
            info = self._call(uri, _info)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(uri, info) if info["type"] == "file" else None

    def exists(self, uri: str) -> bool:
        """Whether a file is at exactly this URI."""
        return self.stat(uri) is not None

    def is_folder(self, uri: str) -> bool:
        """Whether it is a folder; on object stores, a bucket, or a name with anything below it."""
        uri = normalise(uri)
        if is_local(uri):
            return os.path.isdir(uri)
        try:
            if _is_s3(uri):
                return self._call(uri, lambda fs, path: s3_files.is_folder(fs, path))
            return self._call(uri, _info)["type"] == "directory"
        except (FileNotFoundError, NotADirectoryError):
            return False

    def open(self, uri: str) -> BinaryIO:
        """A seekable file to read; on object stores each read is a ranged request, retried on its own.

        On S3 a file that changes meanwhile is noticed, and one that is read from start to end is checked against its
        ETag; `download` does so too, and tries again.
        """
        uri = normalise(uri)
        if is_local(uri):
            return open(uri, "rb")
        if uri.startswith("memory://"):
            return io.BytesIO(self.read_bytes(uri))  # fsspec would hand every reader the same file and position
        entry = self._require(uri)
        if entry.size_bytes is None:
            return io.BytesIO(self.read_bytes(uri))
        return io.BufferedReader(_RangeReader(self, entry), _READ_AHEAD_BYTES)

    def read_bytes(self, uri: str) -> bytes:
        """The whole file; on S3 checked against its ETag."""
        uri = normalise(uri)
        if is_local(uri):
            with open(uri, "rb") as file:
                return file.read()
        if not _is_s3(uri):
            return self._call(uri, lambda fs, path: fs.cat_file(path))
        trust = s3_files.Trust(uri)

        def read(fs: Any, path: str) -> bytes:
            piece = s3_files.get(fs, path)
            if piece.md5 is None and (size_bytes := s3_files.stat(fs, path).size_bytes) != len(piece.data):
                raise DamagedInTransit(f"got {len(piece.data)} bytes, and it has {size_bytes}")
            trust.check(_md5(piece.data), piece.md5)
            return piece.data

        return self._call(uri, read)

    def download(self, uri: str, out: BinaryIO) -> None:
        """Write the whole file to a seekable one, from its present position on, where that is cut off first.

        On S3 it is checked against its ETag, and fetched again if need be.

        Raises:
            OSError: also where what arrives stays wrong; what is in `out` is then undefined.
        """
        uri = normalise(uri)
        if not _is_s3(uri):
            out.truncate()
            with self.open(uri) as file:
                shutil.copyfileobj(file, out, _PIECE_BYTES)
            return
        trust, start = s3_files.Trust(uri), out.tell()
        for attempt in range(1, _MAX_DOWNLOADS + 1):
            out.seek(start)
            out.truncate()
            try:
                trust.check(*self._copy_pieces(uri, out.write))
                return
            except DamagedInTransit as error:
                if attempt == _MAX_DOWNLOADS:
                    raise as_os_error(error, uri, options=self.options) from None

    def create(self, uri: str, data: bytes) -> bool:
        """Put a file that must not exist yet, whole or not at all; of any number of callers exactly one gets True.

        That holds where `conditional_puts` does. Elsewhere two callers at the same moment may both get True.
        """
        uri = normalise(uri)
        if is_local(uri):
            return local_files.create(uri, data)
        if not self.conditional_puts:
            if self.exists(uri):
                return False
            self.overwrite(uri, data)
            return True
        if uri.startswith("memory://"):
            with _MEMORY_LOCK:
                return self._create_remote(uri, data)
        return self._create_remote(uri, data)

    def overwrite(self, uri: str, data: bytes) -> None:
        """Put a file; readers see the old content or the new, never a mixture."""
        uri = normalise(uri)
        if is_local(uri):
            local_files.overwrite(uri, data)
        elif _is_s3(uri):
            self._call(uri, lambda fs, path: s3_files.put(fs, path, data))
        else:
            self._call(uri, lambda fs, path: fs.pipe_file(path, data))

    def delete(self, uri: str) -> None:
        """Remove a file; it is no error when there is none."""
        uri = normalise(uri)
        try:
            if is_local(uri):
                os.unlink(uri)
            elif _is_s3(uri):
                self._call(uri, lambda fs, path: s3_files.delete(fs, path))
            else:
                self._call(uri, lambda fs, path: fs.rm_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return

    def probe(self, folder_uri: str) -> "Storage":
        """Prove, by doing it, that files can be written below `folder_uri`, read and removed; leave nothing.

        -> this storage; or where the store cannot refuse to replace a file, one that does without, after a warning.

        Raises:
            ConfigError: they cannot, or what is read is not what was written.
        """
        folder_uri = normalise(folder_uri)
        missing = local_files.missing_folders(folder_uri) if is_local(folder_uri) else []
        try:
            is_refused = self.conditional_puts and self._is_second_refused(folder_uri)
        except OSError as error:
            advice = f"; {_advice(error)}" if is_local(folder_uri) else ""
            raise ConfigError(f"cannot write to {shown(folder_uri)}: {error}{advice}") from None
        finally:
            local_files.remove_empty(missing)
        if is_refused:
            return self
        if self.conditional_puts:
            logger.warning(
                "%s: the store ignores create-only writes (If-None-Match), so of two runs on this output at the same "
                "time the later may overwrite the plan and the parts of the earlier; start only one at a time",
                shown(folder_uri),
            )
        return replace(self, conditional_puts=False)

    def remove_leftovers(self, folder_uri: str, *, older_than_seconds: float = _LEFTOVER_SECONDS) -> int:
        """Remove the temporary files that killed processes left in the folder, and locally below it; -> how many.

        No reader sees them, as their names are hidden; they only take space.
        """
        folder_uri = normalise(folder_uri)
        if is_local(folder_uri):
            return local_files.remove_leftovers(folder_uri, older_than_seconds=older_than_seconds)
        return 0  # a put that does not end leaves nothing, and a probe that does not, a few hidden bytes

    def _is_second_refused(self, folder_uri: str) -> bool:
        """Create a file twice, read it, and remove it; whether the second attempt was refused."""
        probe_uri = join(folder_uri, local_files.temporary_name())
        first, second = b"kikitori", b"kikitori, again"
        try:
            try:
                created, created_again = self.create(probe_uri, first), self.create(probe_uri, second)
            except NotImplementedByStore:
                self.overwrite(probe_uri, second)
                created, created_again = True, True
            found = self.read_bytes(probe_uri)
        finally:
            self.delete(probe_uri)
        if not created or found != (second if created_again else first):
            raise OSError("a new file does not hold what was written to it")
        return not created_again

    def _walk(self, root: str, pattern: Pattern) -> Iterator[FileEntry]:
        """The files below a folder, in order; those that the pattern cannot mean are left out where that saves work."""
        if is_local(root):
            found = local_files.walk(root, enters=pattern.enters) if os.path.isdir(root) else ()
            return (_local_entry(path, status) for path, status in found)
        if _is_s3(root):
            return self._list_s3(f"{root.rstrip('/')}/{pattern.prefix}")
        return self._find_remote(root)

    def _list_s3(self, prefix_uri: str) -> Iterator[FileEntry]:
        first = self._list_page(prefix_uri, "")

        def entries() -> Iterator[FileEntry]:
            page = first
            yield from page.entries
            while page.next_page:
                page = self._list_page(prefix_uri, page.next_page)
                yield from page.entries

        return ascending(entries()) if first.is_ordered else in_order(entries())

    def _list_page(self, prefix_uri: str, page: str) -> s3_files.Page:
        return self._call(prefix_uri, lambda fs, path: s3_files.list_page(fs, path, page))

    def _find_remote(self, root: str) -> Iterator[FileEntry]:
        protocol = root.partition("://")[0]
        infos: Iterable[Any] = self._call(root, lambda fs, path: list(fs.find(path, detail=True).values()))
        names = ((str(info["name"]), info) for info in infos if info["type"] == "file")
        return in_order(
            _entry(name if "://" in name else f"{protocol}://{name.lstrip('/')}", info) for name, info in names
        )

    def _split_glob(self, uri: str) -> tuple[str, str]:
        """The folder above the first part that is a pattern, and the pattern below it. `[x]` may be a folder's name."""
        start = uri.find("://") + 3 if "://" in uri else 1
        parts = uri[start:].split("/")
        depth = 0
        while depth < len(parts) - 1:
            root = uri[:start] + "/".join(parts[: depth + 1])
            if has_glob(parts[depth]) and not self.is_folder(root):
                break
            depth += 1
        return uri[:start] + "/".join(parts[:depth]), "/".join(parts[depth:])

    def _require(self, uri: str) -> FileEntry:
        entry = self.stat(uri)
        if entry is None:
            raise FileNotFoundError(f"{shown(uri)}: no such file")
        return entry

    def _read_range(self, entry: FileEntry, start: int, end: int) -> s3_files.Piece:
        """The bytes from `start` to before `end`, or of a server that knows no ranges, all of them."""
        if _is_s3(entry.uri):
            return self._get(entry, start, end)
        data = self._call(entry.uri, lambda fs, path: fs.cat_file(path, start=start, end=end))
        if len(data) not in (end - start, entry.size_bytes):
            raise OSError(
                f"{shown(entry.uri)}: asked for bytes {start} to {end}, got {len(data)}; did it change meanwhile?"
            )
        return s3_files.Piece(data=data, md5=None)

    def _get(self, entry: FileEntry, start: int, end: int) -> s3_files.Piece:
        return self._call(
            entry.uri, lambda fs, path: s3_files.get(fs, path, start=start, end=end, version=entry.version)
        )

    def _copy_pieces(self, uri: str, write: Callable[[bytes], object]) -> tuple[str, str | None]:
        """Hand on an object piece by piece; -> the MD5 of what came, and of what the store holds, if it says."""
        entry = self._require(uri)
        size_bytes = entry.size_bytes or 0
        digest, expected = hashlib.md5(usedforsecurity=False), None
        for start in range(0, size_bytes, _PIECE_BYTES):
            piece = self._get(entry, start, min(start + _PIECE_BYTES, size_bytes))
            digest.update(piece.data)
            write(piece.data)
            expected = piece.md5
        return digest.hexdigest(), expected

    def _confirm(self, entry: FileEntry, md5: str, expected: str | None) -> None:
        """Refuse bytes read in pieces that are not what the store holds.

        Raises:
            DamagedInTransit: they are not.
        """
        trust = s3_files.Trust(entry.uri)
        try:
            try:
                trust.check(md5, expected)
            except DamagedInTransit:
                again, expected = self._copy_pieces(entry.uri, len)
                if again != md5:
                    raise
                trust.check(again, expected)
        except DamagedInTransit as error:
            raise as_os_error(error, entry.uri, options=self.options) from None

    def _create_remote(self, uri: str, data: bytes) -> bool:
        creator = uuid.uuid4().hex
        try:
            if _is_s3(uri):
                self._call(uri, lambda fs, path: s3_files.put(fs, path, data, creator=creator))
            else:
                self._call(uri, lambda fs, path: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            if not self.exists(uri):
                raise OSError(
                    f"{shown(uri)}: cannot be created, something that is not a file is in its way; move it away"
                ) from None
            # A put whose answer was lost is repeated, by us or below us, and then finds its own object.
            return _is_s3(uri) and self._call(uri, lambda fs, path: s3_files.creator_of(fs, path)) == creator
        return True

    def _call(self, uri: str, action: Callable[[Any, str], _T]) -> _T:
        """`action(fs, path)` with retries; whatever fails comes out as an `OSError` that names `uri` and no secret.

        The path is the URI on S3, and what fsspec makes of it elsewhere.
        """
        try:
            fs = self._connect(uri)
            path = uri if _is_s3(uri) else str(fs._strip_protocol(uri))
            return with_retries(lambda: action(fs, path))
        except remote_errors() as error:
            raise as_os_error(error, uri, options=self.options) from None

    def _connect(self, uri: str) -> Any:
        """fsspec caches what it makes by its options, so this connects once per process."""
        protocol = uri.partition("://")[0]
        options = dict(self.options)
        if _is_s3(uri):
            options["config_kwargs"] = {**s3_files.DEFAULT_CONFIG, **options.get("config_kwargs", {})}
        elif _is_http(uri):
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {"timeout": ClientTimeout(**_HTTP_SECONDS), **options.get("client_kwargs", {})}
        try:
            fs = fsspec.filesystem(protocol, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{shown(uri)}: no way to read {protocol}:// here: {error}") from None
        if _is_s3(uri):
            fs.retries = 1
        return fs


class _RangeReader(io.RawIOBase):
    """A remote file of known size, read by ranges."""

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._storage = storage
        self._entry = entry
        self._size_bytes = entry.size_bytes or 0
        self._position = 0
        self._whole = b""  # once a server has sent it all, whatever it was asked for
        self._digest = hashlib.md5(usedforsecurity=False)
        self._num_digested = 0  # bytes from the start, as far as they were read in a row
        self._md5: str | None = None  # of the whole file, as the store says

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise OSError(f"{shown(self._entry.uri)}: seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """In pieces of a size that pays; Python's own would ask for 8 kB at a time."""
        return b"".join(iter(lambda: self._take(_PIECE_BYTES), b""))

    def _take(self, num_bytes: int) -> bytes:
        start = self._position
        end = min(start + num_bytes, self._size_bytes)
        if start >= end:
            return b""
        if not self._whole:
            piece = self._storage._read_range(self._entry, start, end)  # pyright: ignore[reportPrivateUsage]
            data, self._md5 = piece.data, piece.md5
        else:
            data = self._whole[start:end]
        if len(data) != end - start:
            self._whole, data = data, data[start:end]
        self._position = end
        self._follow(start, data)
        return data

    def _follow(self, start: int, data: bytes) -> None:
        if start != self._num_digested:
            return
        self._digest.update(data)
        self._num_digested += len(data)
        if self._num_digested == self._size_bytes:
            self._storage._confirm(  # pyright: ignore[reportPrivateUsage] (the same file of ours)
                self._entry, self._digest.hexdigest(), self._md5
            )


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _info(fs: Any, path: str) -> Any:
    try:
        return fs.info(path)
    except FileNotFoundError as error:
        # fsspec says "not found" of whatever goes wrong on HTTP, a host that is down included.
        if _is_http(path) and isinstance(error.__cause__, Exception) and answer_of(error)[1] not in (404, 410):
            raise error.__cause__ from None
        raise


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _is_encodable(uri: str) -> bool:
    try:
        os.fsencode(uri)
    except UnicodeEncodeError:
        return False
    return True


def _entry(uri: str, info: Mapping[str, Any]) -> FileEntry:
    keys = ("ETag", "etag", "LastModified", "last_modified", "mtime", "modified", "created")
    value = next((info[key] for key in keys if info.get(key)), "")
    # fsspec's memory files show one time as a datetime in `info` and as a float in `find`.
    version = value.timestamp() if isinstance(value, datetime) else value
    return FileEntry(uri=uri, size_bytes=info.get("size"), version=str(version).strip('"'))


def _local_entry(path: str, status: os.stat_result | None) -> FileEntry:
    if status is None:
        return FileEntry(uri=path, size_bytes=None, version="")
    return FileEntry(uri=path, size_bytes=status.st_size, version=str(status.st_mtime_ns))


def _advice(error: OSError) -> str:
    """What to do about a local path that cannot be written; some errors say so themselves."""
    if isinstance(error, NotADirectoryError):
        return "a part of the path is a file; choose another place"
    if isinstance(error, FileNotFoundError):
        return "create the folder first, or correct its name"
    return "give this process the right to write and delete there, or choose another place"
