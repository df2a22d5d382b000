"""What listings consist of: entries, the patterns that choose among them, and the one order they come in.

The order is that of the URIs as text, which for names in UTF-8 is also the order of their bytes, and the one that S3
lists in. It is total and the same on every kind of storage, so listings can be merged and compared without collecting.
"""

import heapq
import itertools
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from tempfile import TemporaryFile
from typing import IO

from fsspec.utils import glob_translate

from pipeline.errors import ConfigError

_RUN_LENGTH = 200_000  # entries sorted at a time: about 60 MB
_MAGIC = re.compile(r"[*?\[]")
_uri = attrgetter("uri")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file as a listing shows it. `version` changes when the content may have: an ETag, else the time of change."""

    uri: str
    size_bytes: int | None
    version: str


def has_glob(uri: str) -> bool:
    """Whether it is written as a pattern. A file of exactly that name still wins: `list_files` looks for it first."""
    return _MAGIC.search(uri) is not None


class Pattern:
    """Names below a folder: `*`, `?` and `[]` within one level, `**` across them.

    Hidden names (`.name`, at any level) match only a pattern that names hidden ones itself.

    Raises:
        ConfigError: it means nothing.
    """

    def __init__(self, text: str) -> None:
        self.prefix = _MAGIC.split(text, maxsplit=1)[0]  # what every name that matches starts with
        self._shows_hidden = _is_hidden(text)
        try:
            self._whole = re.compile(glob_translate(text))
            levels = text.split("/")
            # From the first `**` on, a folder may have any name and any depth.
            fixed = list(itertools.takewhile(lambda level: "**" not in level, levels))
            self._levels = [re.compile(glob_translate(level)) for level in fixed]
            self._is_deep = len(fixed) < len(levels)
        except ValueError as error:
            raise ConfigError(f"{text}: {error}") from None

    def wants(self, name: str) -> bool:
        """Whether a file of this name is meant."""
        return self._whole.match(name) is not None and (self._shows_hidden or not _is_hidden(name))

    def enters(self, folder: str) -> bool:
        """Whether anything below a folder of this name can be meant."""
        if _is_hidden(folder) and not self._shows_hidden:
            return False
        levels = folder.split("/")
        if not self._is_deep and len(levels) >= len(self._levels):
            return False
        return all(wanted.match(level) for wanted, level in zip(self._levels, levels, strict=False))


def ascending(entries: Iterable[FileEntry]) -> Iterator[FileEntry]:
    """The same entries; those who merge listings rely on their order, so a store that breaks it is not read on.

    Raises:
        OSError: an entry comes after one it should precede.
    """
    last = ""
    for entry in entries:
        if entry.uri < last:
            raise OSError(f"{entry.uri}: listed after {last}; this store does not list in order of names, report it")
        last = entry.uri
        yield entry


def in_order(entries: Iterable[FileEntry], *, run_length: int = _RUN_LENGTH) -> Iterator[FileEntry]:
    """Any entries in the one order, with memory for `run_length` of them; the rest waits in temporary files."""
    remaining = iter(entries)
    runs: list[Iterable[FileEntry]] = []
    while run := sorted(itertools.islice(remaining, run_length), key=_uri):
        runs.append(run if len(run) < run_length else _on_disk(run))
    return heapq.merge(*runs, key=_uri)


def _on_disk(run: list[FileEntry]) -> Iterator[FileEntry]:
    file = TemporaryFile()  # noqa: SIM115 (closed by its reader, or when that is forgotten)
    for entry in run:
        pickle.dump((entry.uri, entry.size_bytes, entry.version), file)
    file.seek(0)
    return _read(file, len(run))


def _read(file: IO[bytes], count: int) -> Iterator[FileEntry]:
    with file:
        for _ in range(count):
            uri, size_bytes, version = pickle.load(file)
            yield FileEntry(uri=uri, size_bytes=size_bytes, version=version)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name
