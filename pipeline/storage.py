"""Files by URI: the only file of ours that imports fsspec.

Local paths and `file://` go straight to the operating system (`local_files`), because a whole-or-nothing create needs
`link` and `fsync`, which fsspec does not offer. Everything else (`s3://`, `memory://`, ...) is reached through fsspec,
and every call there is retried here and nowhere else: the retries inside botocore and s3fs are switched off, as theirs,
times theirs, times ours would wait an hour for a dead endpoint.
"""

import io
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.utils import glob_translate

from pipeline import local_files
from pipeline.errors import ConfigError
from pipeline.retries import as_os_error, remote_errors, with_retries

_T = TypeVar("_T")
_READ_AHEAD_BYTES = 256 * 1024  # of small reads; a bigger one is a single request of its own size
_PUT_SECONDS = 30  # beside the time the bytes need
_PUT_BYTES_PER_SECOND = 1_000_000  # slower than any link worth running on
_WRITER_KEY = "kikitori-writer"  # user metadata on S3 that names who created an object
_MEMORY_LOCK = threading.Lock()  # fsspec's memory store is one per process, and checks before it writes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file as a listing shows it. `version` changes when the content may have: an ETag, else the time of change."""

    uri: str
    size_bytes: int | None
    version: str


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


def has_glob(uri: str) -> bool:
    """Whether it is written as a pattern. A file of exactly that name still wins: `list_files` looks for it first."""
    return any(character in uri for character in "*?[")


@dataclass(frozen=True, slots=True)
class Storage:
    """Reads, lists and writes whole files. Holds options only, no connection, so it pickles and forks.

    Local paths raise what the operating system raises. Elsewhere a transient fault is retried; what remains raises
    `FileNotFoundError` where nothing is there and another `OSError` else, with the URI and without any secret.

    Args:
        options: handed to fsspec as they are (credentials, endpoint); never logged or shown.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def list_files(self, uri: str) -> Iterator[FileEntry]:
        """The file, the files below the folder, or those the glob matches (`**` crosses folders), sorted by URI.

        Hidden files and folders (`.name`) are left out, unless the glob names them; links to folders are not followed.

        Raises:
            FileNotFoundError: nothing is there, and `uri` is not a glob. A glob without matches yields nothing.
        """
        uri = normalise(uri)
        if (entry := self.stat(uri)) is not None:
            yield entry
            return
        is_folder = self.is_folder(uri)
        if not is_folder and not has_glob(uri):
            raise FileNotFoundError(f"{uri}: no such file or folder")
        root, pattern = (uri, "**") if is_folder else self._split_glob(uri)
        found = _walk_local(root) if is_local(root) else self._walk_remote(root)
        wanted = [entry for entry in found if _matches(entry.uri[len(root.rstrip("/")) + 1 :], pattern)]
        yield from sorted(wanted, key=lambda entry: entry.uri)

    def stat(self, uri: str) -> FileEntry | None:
        """The file at exactly this URI; None where there is none, or a folder."""
        uri = normalise(uri)
        if is_local(uri):
            status = local_files.stat_file(uri)
            return _local_entry(uri, status) if status is not None else None
        try:
            info = self._call(uri, lambda fs, path: fs.info(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(uri, info) if info["type"] == "file" else None

    def exists(self, uri: str) -> bool:
        """Whether a file is at exactly this URI."""
        return self.stat(uri) is not None

    def is_folder(self, uri: str) -> bool:
        """Whether it is a folder; on object stores, whether anything is below it."""
        uri = normalise(uri)
        if is_local(uri):
            return os.path.isdir(uri)
        try:
            return self._call(uri, lambda fs, path: fs.info(path))["type"] == "directory"
        except (FileNotFoundError, NotADirectoryError):
            return False

    def open(self, uri: str) -> BinaryIO:
        """A seekable file to read; on object stores each read is a ranged request, retried on its own."""
        uri = normalise(uri)
        if is_local(uri):
            return open(uri, "rb")
        if uri.startswith("memory://"):
            return io.BytesIO(self.read_bytes(uri))  # fsspec would hand every reader the same file and position
        entry = self.stat(uri)
        if entry is None:
            raise FileNotFoundError(f"{uri}: no such file")
        if entry.size_bytes is None:
            return io.BytesIO(self.read_bytes(uri))
        return io.BufferedReader(_RangeReader(self, uri, entry.size_bytes), _READ_AHEAD_BYTES)

    def read_bytes(self, uri: str) -> bytes:
        """The whole file."""
        uri = normalise(uri)
        if is_local(uri):
            with open(uri, "rb") as file:
                return file.read()
        return self._call(uri, lambda fs, path: fs.cat_file(path))

    def create(self, uri: str, data: bytes) -> bool:
        """Put a file that must not exist yet, whole or not at all; of any number of callers exactly one gets True."""
        uri = normalise(uri)
        if is_local(uri):
            return local_files.create(uri, data)
        if uri.startswith("memory://"):
            with _MEMORY_LOCK:
                return self._create_remote(uri, data)
        return self._create_remote(uri, data)

    def overwrite(self, uri: str, data: bytes) -> None:
        """Put a file; readers see the old content or the new, never a mixture."""
        uri = normalise(uri)
        if is_local(uri):
            local_files.overwrite(uri, data)
        else:
            bounds = _put_bounds(data) if _is_s3(uri) else {}
            self._call(uri, lambda fs, path: fs.pipe_file(path, data, **bounds))

    def delete(self, uri: str) -> None:
        """Remove a file; it is no error when there is none."""
        uri = normalise(uri)
        try:
            if is_local(uri):
                os.unlink(uri)
            else:
                self._call(uri, lambda fs, path: fs.rm_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return

    def check_writable(self, folder_uri: str) -> None:
        """Prove, by doing it, that files can be created below `folder_uri`, once only, and removed; leave nothing.

        Raises:
            ConfigError: they cannot.
        """
        folder_uri = normalise(folder_uri)
        probe_uri = join(folder_uri, local_files.temporary_name())
        missing = local_files.missing_folders(folder_uri) if is_local(folder_uri) else []
        try:
            created = self.create(probe_uri, b"kikitori")
            created_again = self.create(probe_uri, b"kikitori, again")
            self.delete(probe_uri)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder_uri}: {error}; {_advice(error)}") from None
        finally:
            local_files.remove_empty(missing)
        if not created or created_again:
            raise ConfigError(
                f"{folder_uri}: the store ignores create-only writes (If-None-Match), so two runs could overwrite each "
                "other's results; use a store that honours them"
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

    def _walk_remote(self, root: str) -> Iterator[FileEntry]:
        protocol = root.partition("://")[0]
        infos = self._call(root, lambda fs, path: list(fs.find(path, detail=True).values()))
        for info in infos:
            name = str(info["name"])
            # Keys that end in a slash are folder markers some S3 consoles leave behind.
            if info["type"] == "file" and not name.endswith("/"):
                yield _entry(name if "://" in name else f"{protocol}://{name.lstrip('/')}", info)

    def _create_remote(self, uri: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        on_s3 = _is_s3(uri)
        marks = {"Metadata": {_WRITER_KEY: writer}, **_put_bounds(data)} if on_s3 else {}
        try:
            self._call(uri, lambda fs, path: fs.pipe_file(path, data, mode="create", **marks))
        except FileExistsError:
            if not self.exists(uri):
                raise OSError(f"{uri}: cannot be created, something that is not a file is in its way") from None
            # A put whose answer was lost is repeated, by us or below us, and then finds its own object.
            return on_s3 and self._call(uri, lambda fs, path: fs.metadata(path)).get(_WRITER_KEY) == writer
        return True

    def _call(self, uri: str, action: Callable[[Any, str], _T]) -> _T:
        """`action(fs, path)` with retries; whatever fails comes out as an `OSError` that names `uri` and no secret."""
        try:
            fs = self._connect(uri)
            path = str(fs._strip_protocol(uri))
            return with_retries(lambda: action(fs, path))
        except remote_errors() as error:
            raise as_os_error(error, uri, options=self.options) from None

    def _connect(self, uri: str) -> Any:
        """fsspec caches what it makes by its options, so this connects once per process."""
        protocol = uri.partition("://")[0]
        options = dict(self.options)
        if _is_s3(uri):
            config = {"retries": {"total_max_attempts": 1}, **options.pop("config_kwargs", {})}
            # A cached listing would show a run its own files as missing.
            options = {"use_listings_cache": False, **options, "config_kwargs": config}
        try:
            fs = fsspec.filesystem(protocol, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{uri}: no way to read {protocol}:// here: {error}") from None
        if _is_s3(uri):
            fs.retries = 1
        return fs


class _RangeReader(io.RawIOBase):
    """A remote file of known size, read by ranges."""

    def __init__(self, storage: Storage, uri: str, size_bytes: int) -> None:
        self._storage = storage
        self._uri = uri
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise OSError(f"{self._uri}: seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        start = self._position
        end = min(start + len(buffer), self._size_bytes)
        if start >= end:
            return 0
        data = self._storage._call(  # pyright: ignore[reportPrivateUsage] (one file, one connection)
            self._uri, lambda fs, path: fs.cat_file(path, start=start, end=end)
        )
        if len(data) != end - start:
            raise OSError(f"{self._uri}: asked for bytes {start} to {end}, got {len(data)}; did it change meanwhile?")
        buffer[: len(data)] = data
        self._position = end
        return len(data)


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def _put_bounds(data: bytes) -> dict[str, float]:
    """How long fsspec may wait for a put: aiohttp alone would wait forever for a server to say `100 Continue`."""
    return {"timeout": _PUT_SECONDS + len(data) / _PUT_BYTES_PER_SECOND}


def _matches(name: str, pattern: str) -> bool:
    try:
        matched = re.match(glob_translate(pattern), name)
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}") from None
    return matched is not None and (_is_hidden(pattern) or not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


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


def _walk_local(root: str) -> Iterator[FileEntry]:
    if os.path.isdir(root):
        for path, status in local_files.walk(root):
            yield _local_entry(path, status)


def _local_entry(path: str, status: os.stat_result | None) -> FileEntry:
    if status is None:
        return FileEntry(uri=path, size_bytes=None, version="")
    return FileEntry(uri=path, size_bytes=status.st_size, version=str(status.st_mtime_ns))


def _advice(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "give this process the right to write and delete there, or choose another place"
    if isinstance(error, NotADirectoryError):
        return "a part of the path is a file; choose another place"
    if isinstance(error, FileNotFoundError):
        return "create the bucket or the folder first, or correct its name"
    return "check the address, the network, the credentials and the free space"
