"""Tars as WebDataset writes them: which files are inside, and where their bytes are. Nothing is unpacked."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import InputError

_REST_BYTES = 1024 * 1024  # tars are filled up with zeros to a multiple of 10 KiB, or of what their writer chose


@dataclass(frozen=True, slots=True, kw_only=True)
class TarEntry:
    """A file in a tar."""

    name: str
    offset_bytes: int  # where its bytes begin
    size_bytes: int
    fault: str | None  # why its bytes cannot be read from there


class _Forgetful(tarfile.TarFile):
    """A tar whose list of headers can be emptied, so that memory does not grow with it."""

    members: list[tarfile.TarInfo]


def tar_entries(file: BinaryIO) -> Iterator[TarEntry]:
    """The files of an uncompressed tar in their order; folders and devices are passed over.

    One header is read per file, so a remote tar costs a request per file bigger than the read-ahead.

    Raises:
        InputError: BAD_CONTAINER, possibly after some files: this is no tar, or it ends or is damaged in the middle.
    """
    num_files = 0
    try:
        with _Forgetful(fileobj=file, mode="r", errorlevel=2) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()
                if info.isreg() or info.islnk() or info.issym():
                    num_files += 1
                    yield _entry(info)
            _check_end(file, tar.offset)
    except tarfile.TarError as error:
        raise InputError("BAD_CONTAINER", _damage(str(error), num_files)) from None


def _entry(info: tarfile.TarInfo) -> TarEntry:
    fault = None
    if not info.isreg():
        fault = f"{info.name} is a link to {info.linkname}; write the tar with the file itself in that place"
    elif info.issparse():
        fault = f"{info.name} is stored as a sparse file; write the tar without --sparse"
    return TarEntry(name=info.name, offset_bytes=info.offset_data, size_bytes=info.size, fault=fault)


def _check_end(file: BinaryIO, offset_bytes: int) -> None:
    """`tarfile` ends without a word where no header can be read; a whole tar ends with blocks of zeros."""
    file.seek(offset_bytes)
    rest = file.read(_REST_BYTES)
    if not rest:
        raise tarfile.ReadError("it ends without its end mark, as if cut off")
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {offset_bytes}")
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"more follows its end mark at byte {offset_bytes}, as if tars had been joined")


def _damage(reason: str, num_files: int) -> str:
    if not num_files:
        return f"this is not an uncompressed tar ({reason}); write it again, or rename it"
    return (
        f"the tar is damaged after {num_files} files ({reason}); those before are inputs, write it again for the rest"
    )
