"""Source -> its encoded bytes, wherever they are: a file, a tar, a Parquet file, a recording it is a part of."""

import hashlib
import io
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.input_lists import beside
from pipeline.messages import ParquetRow, Segment, Source, TarMember
from pipeline.parquet_files import AudioCell, ParquetCells
from pipeline.storage import Storage, is_local

_COPY_BYTES = 8 * 1024 * 1024  # of one request when a remote file is fetched
_SPOOL_BYTES = 64 * 1024 * 1024  # bigger remote files are copied to the temporary folder instead of memory


class AudioFiles:
    """Opens sources one at a time. A file that holds several of them is opened once if they come in a row.

    Raises, on opening:
        InputError: NOT_FOUND if the member or row is not there any more, BAD_CONTAINER if its file is damaged.
        OSError: as `Storage.open`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._held_key: tuple[type, str] | None = None
        self._held: Any = None  # what the sources of one file share: it, open, or a copy of it
        self._release = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    @contextmanager
    def fetched(self, source: Source) -> Generator[tuple[BinaryIO, str]]:
        """The encoded bytes, seekable at no cost, and their SHA-256; of a segment, those of the whole recording."""
        self._let_go_unless(source)
        match source.place:
            case None:
                opening = self._file(source.uri)
            case Segment() as segment:
                opening = nullcontext(self._hold(source, lambda: self._file(segment.file_uri)))
            case TarMember() as member:
                opening = _copied(self._section(source, member), is_at_hand=is_local(member.file_uri))
            case ParquetRow() as row:
                opening = self._cell_bytes(source, row)
        with opening as (file, digest):
            file.seek(0)
            yield file, digest

    @contextmanager
    def peeked(self, source: Source) -> Generator[BinaryIO]:
        """The encoded bytes where they lie, for reading a header; remote ones are read by range."""
        self._let_go_unless(source)
        match source.place:
            case TarMember() as member:
                opening = self._section(source, member)
            case ParquetRow() as row:
                cell = self._cell(source, row)
                uri = _named_by(cell, source, row)
                opening = self._storage.open(uri) if uri else io.BytesIO(cell.data or b"")
            case _:
                opening = self._storage.open(source.file_uri)
        with opening as file:
            yield file

    @contextmanager
    def _file(self, uri: str) -> Generator[tuple[BinaryIO, str]]:
        """A whole file. Decoders seek, so a remote one is fetched first, to memory or to the temporary folder."""
        if is_local(uri):
            with self._storage.open(uri) as file:
                yield file, _hash(file)
            return
        with SpooledTemporaryFile(_SPOOL_BYTES) as copy:
            file = cast(BinaryIO, copy)
            self._storage.download(uri, file)
            file.seek(0)
            yield file, _hash(file)

    def _section(self, source: Source, member: TarMember) -> BinaryIO:
        tar = self._hold(source, lambda: self._unchanged(member))
        return io.BufferedReader(_Section(tar, member.offset_bytes, source.size_bytes or 0))

    @contextmanager
    def _cell_bytes(self, source: Source, row: ParquetRow) -> Generator[tuple[BinaryIO, str]]:
        cell = self._cell(source, row)
        uri = _named_by(cell, source, row)
        if uri is None:
            file = io.BytesIO(cell.data or b"")
            yield file, _hash(file)
            return
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(self._file(uri))
            except (FileNotFoundError, NotADirectoryError):
                raise InputError("NOT_FOUND", f"{source.uri} holds no bytes but a path; nothing is at {uri}") from None
            yield opened

    def _cell(self, source: Source, row: ParquetRow) -> AudioCell:
        try:
            return self._hold(source, lambda: self._cells(row)).read(row.row)
        except LookupError:
            raise InputError("NOT_FOUND", f"{source.uri} is not there any more; restore it, or plan again") from None
        except pa.ArrowInvalid as error:
            raise InputError("BAD_CONTAINER", f"{row.file_uri} is damaged ({error}); write it again") from None

    @contextmanager
    def _cells(self, place: ParquetRow) -> Generator[ParquetCells]:
        with self._unchanged(place) as file:
            yield ParquetCells(file, place.column)

    @contextmanager
    def _unchanged(self, place: TarMember | ParquetRow) -> Generator[BinaryIO]:
        """The container, if it still is what was planned: else another recording would be taken for this one."""
        entry = self._storage.stat(place.file_uri)
        if entry is None:
            raise FileNotFoundError(place.file_uri)
        if entry.version != place.file_version:
            raise InputError(
                "NOT_FOUND",
                f"{place.file_uri} has changed since it was planned, and what it held may be elsewhere; run again, and "
                "what it holds now is planned as new inputs",
            )
        with self._storage.open(place.file_uri) as file:
            yield file

    def _hold(self, source: Source, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        """What `make` makes, kept open until a source of another file comes."""
        self._let_go_unless(source)
        if self._held_key is None:
            self._held = self._release.enter_context(make())
            self._held_key = _key(source)
        return self._held

    def _let_go_unless(self, source: Source) -> None:
        if self._held_key != _key(source):
            self._let_go()

    def _let_go(self) -> None:
        self._held_key, self._held = None, None
        self._release.close()


def _key(source: Source) -> tuple[type, str]:
    return type(source.place), source.file_uri


def _named_by(cell: AudioCell, source: Source, row: ParquetRow) -> str | None:
    """The URI of the file that a cell names; None for one that holds the bytes."""
    if cell.data is not None:
        return None
    if not cell.path:
        raise InputError("BAD_CONTAINER", f"{source.uri} holds neither bytes nor a path in its column {row.column}")
    return beside(row.file_uri.rpartition("/")[0], cell.path)


@contextmanager
def _copied(section: BinaryIO, *, is_at_hand: bool) -> Generator[tuple[BinaryIO, str]]:
    if is_at_hand:
        yield section, _hash(section)
        return
    with SpooledTemporaryFile(_SPOOL_BYTES) as copy:
        yield cast(BinaryIO, copy), _hash(section, then=copy.write)


def _hash(file: BinaryIO, *, then: Callable[[bytes], object] = len) -> str:
    """SHA-256 of what is left of the file, in hexadecimal; every part of it is handed to `then` too."""
    sha256 = hashlib.sha256()
    while data := file.read(_COPY_BYTES):
        sha256.update(data)
        then(data)
    return sha256.hexdigest()


class _Section(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset_bytes: int, size_bytes: int) -> None:
        self._file = file
        self._offset_bytes, self._size_bytes = offset_bytes, size_bytes
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
            raise OSError(f"seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        length = min(len(buffer), self._size_bytes - self._position)
        if length <= 0:
            return 0
        self._file.seek(self._offset_bytes + self._position)
        data = self._file.read(length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
