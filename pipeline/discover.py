"""URIs -> sources: which files are inputs, which hold or name inputs, and which are plainly not audio.

What a URI in `input.uris` stands for:

* a folder: every file below it that is not plainly something else, and what is inside of its tars and Parquet files,
  because these hold audio. What only names audio (manifests, lists) is left out: the audio it names is often in the
  same folder, and would be transcribed twice. A Parquet file without an audio column is left out too.
* a glob: as a folder. Manifests and lists are read if the glob ends in their extension (`s3://b/*.jsonl`).
* a file: itself, or what it holds or names, by its extension: `.tar` (WebDataset), `.parquet` (Hugging Face Audio),
  `.jsonl` and `.json` (NeMo manifest), `.txt` and `.lst` (a URI per line).

Listing is lazy, and so is everything that follows from it. Of files nothing is read; of a tar the headers, of a Parquet
file the footer, of a manifest every line. What a manifest names is not looked at before it is loaded: ten million
requests would take hours. So such an input is known by its URI, offset and duration, not by the size and version of its
file, and a recording that is replaced under its name is not seen as a new one.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import PurePosixPath
from typing import BinaryIO, Literal, TypeVar

import pyarrow as pa

from pipeline.errors import ConfigError, InputError, SystemFailure
from pipeline.input_lists import BadLine, NamedAudio, list_lines, manifest_lines
from pipeline.messages import ParquetRow, Segment, Source, TarMember
from pipeline.parquet_files import read_footer
from pipeline.storage import FileEntry, Storage, has_glob, join, normalise, shown
from pipeline.tar_files import TarEntry, tar_entries
from pipeline.write import part_uri

_T = TypeVar("_T")
# Extensions are not believed: what is not listed here is tried, since audio skipped in silence is lost.
_NOT_AUDIO = """
    txt lst md rst rtf doc docx xls xlsx ppt pptx pdf html htm css js json jsonl csv tsv parquet arrow feather xml
    yaml yml toml ini cfg conf env png jpg jpeg gif svg webp bmp tif tiff heic ico py pyc ipynb sh bat log out err srt
    vtt ass ssa sbv lrc lab textgrid eaf stm ctm rttm trn m3u m3u8 pls cue npz npy pt pth ckpt safetensors onnx pkl h5
    hdf5 db sqlite zip gz bz2 xz zst 7z rar tar tgz md5 sha1 sha256 lock
"""
# Only to tell, in a WebDataset sample that has one of these, the audio from fields of any name (`cls`, `speaker`).
_AUDIO = "aac aif aifc aiff amr au caf flac m4a mka mkv mov mp2 mp3 mp4 oga ogg opus sph wav weba webm wma"
_AUDIO_EXTENSIONS = frozenset(f".{name}" for name in _AUDIO.split())
_NOT_AUDIO_EXTENSIONS = frozenset(f".{name}" for name in _NOT_AUDIO.split())
_HOLD_AUDIO = frozenset({".tar", ".parquet"})
_NAME_AUDIO: Mapping[str, Callable[[BinaryIO, str], Iterator[NamedAudio | BadLine]]] = {
    ".jsonl": manifest_lines,
    ".json": manifest_lines,
    ".txt": list_lines,
    ".lst": list_lines,
}
_COMPRESSED = re.compile(r"\.(tgz|(tar|parquet|jsonl|json|txt|lst)\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_NUM_OPENED = 8  # tars and Parquet files looked into at a time; what their headers say is held until it is their turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An input as it was found; `version` is that of its file, changes when its content does, and may be unknown."""

    source: Source
    version: str
    declared_seconds: float | None = None  # as a manifest says
    mean_bytes: int | None = None  # of a row, as its row group has it

    @property
    def size_bytes(self) -> int | None:
        """Of the encoded audio, exactly or about."""
        return self.mean_bytes if self.source.size_bytes is None else self.source.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What the configured URIs hold, in order of URI."""

    found: tuple[Found, ...]
    ignored: Mapping[str, int]  # as in `Search`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Root:
    """One of the configured URIs, and what it is."""

    uri: str
    kind: Literal["folder", "glob", "file"]
    entry: FileEntry  # of a file


def discover(uris: Sequence[str], storage: Storage, *, output_uri: str = "") -> Discovery:
    """All that `Search` finds at once, for inputs few enough to be held; reached twice, they are there once.

    Raises:
        ConfigError, SystemFailure: as `Search`.
    """
    search = Search(uris, storage, output_uri=output_uri)
    found = {one.source.id: one for one in search}
    ordered = sorted(found.values(), key=lambda one: (one.source.uri, one.source.id))
    return Discovery(found=tuple(ordered), ignored=search.ignored)


class Search:
    """The inputs behind folders, globs and files, found while it is iterated. The output is never taken as input.

    What is reached twice comes twice, with the same id. A file named by itself is always an input, even if it does not
    exist: it will have its row. So will a member, a line or a container that leads to no audio: it comes as a source
    with a `fault`, since one of them must not stop a corpus, and must not vanish either.

    Raises, the first two while it is made, all while it is iterated:
        ConfigError: nothing to list, a folder, glob or container without audio, a file that is no manifest.
        SystemFailure: the storage does not answer.
    """

    def __init__(self, uris: Sequence[str], storage: Storage, *, output_uri: str = "") -> None:
        if not uris:
            raise ConfigError("input.uris is empty; name at least one folder, glob or file, e.g. s3://bucket/audio/")
        self._storage = storage
        self._output_uri = output_uri
        self._roots = [_answered(uri, lambda uri=uri: _root(uri, storage)) for uri in uris]
        self._named = frozenset(root.entry.uri for root in self._roots if root.kind == "file")
        self._ignored: Counter[str] = Counter()

    @property
    def ignored(self) -> Mapping[str, int]:
        """Extension with its dot (or `_*`, by name) -> files that are plainly not audio, of those listed so far."""
        return dict(self._ignored.most_common())

    def __iter__(self) -> Iterator[Found]:
        self._ignored.clear()
        for root in self._roots:
            yield from _answering(root.uri, self._below(root))

    def _below(self, root: _Root) -> Iterator[Found]:
        left_out: Counter[str] = Counter()
        num_found = 0
        for one in self._inside(self._listed(root, left_out), root, left_out):
            num_found += 1
            yield one
        self._ignored += left_out
        if not num_found:
            raise ConfigError(_why_nothing(root, left_out))

    def _listed(self, root: _Root, left_out: Counter[str]) -> Iterator[FileEntry]:
        """The files of a root that may be inputs or hold some; the others are counted in `left_out`."""
        if root.kind == "file":
            yield root.entry
            return
        above = re.split(r"[*?\[]", normalise(root.uri), maxsplit=1)[0].rpartition("/")[0]
        written_by_us = _written_by_us(normalise(root.uri) if root.kind == "folder" else above, self._output_uri)
        for entry in self._storage.list_files(root.uri):
            if entry.uri.startswith(written_by_us):
                continue
            kind = _kind_if_not_audio(entry.uri)
            if kind is None or _is_opened(entry.uri, root):
                yield entry
            elif entry.uri not in self._named:
                left_out[kind] += 1

    def _inside(self, entries: Iterable[FileEntry], root: _Root, left_out: Counter[str]) -> Iterator[Found]:
        """Files as they come; containers a few at a time, because each costs some round trips."""
        with ThreadPoolExecutor(_NUM_OPENED) as threads:
            waiting: list[FileEntry] = []
            for entry in entries:
                if not _is_opened(entry.uri, root):
                    yield _found(entry)
                elif extension(entry.uri) in _NAME_AUDIO:
                    yield from self._named_in(entry)
                else:
                    waiting.append(entry)
                if len(waiting) == _NUM_OPENED:
                    yield from self._held_in(waiting, threads, root, left_out)
                    waiting.clear()
            yield from self._held_in(waiting, threads, root, left_out)

    def _held_in(
        self, entries: Sequence[FileEntry], threads: ThreadPoolExecutor, root: _Root, left_out: Counter[str]
    ) -> Iterator[Found]:
        def look(entry: FileEntry) -> Iterable[Found]:
            return _open_container(entry, self._storage, is_named=_is_named(entry.uri, root))

        for entry, inside in zip(entries, threads.map(look, entries), strict=True):
            num_found = 0
            for one in inside:
                num_found += 1
                yield one
            if not num_found and entry.uri not in self._named:
                left_out[extension(entry.uri)] += 1

    def _named_in(self, entry: FileEntry) -> Iterator[Found]:
        """What a manifest or a list names; a tar or a Parquet file in it stands for what it holds."""
        with self._storage.open(entry.uri) as file:
            for line in _NAME_AUDIO[extension(entry.uri)](file, entry.uri):
                if isinstance(line, BadLine):
                    yield _bad_line(entry.uri, line)
                elif extension(line.uri) in _HOLD_AUDIO:
                    there = self._storage.stat(line.uri) or FileEntry(uri=line.uri, size_bytes=None, version="")
                    yield from _open_container(there, self._storage, is_named=True)
                else:
                    yield _named_audio(line)


def source_id(uri: str, size_bytes: int | None, version: str) -> str:
    """32 hex digits: the same for the same input in any run, another one once it has changed."""
    # JSON keeps the three apart, and takes file names that are not UTF-8.
    return hashlib.sha256(json.dumps([normalise(uri), size_bytes, version]).encode()).hexdigest()[:32]


def inner_id(kind: str, *parts: str) -> str:
    """32 hex digits for what is in a container or named by a manifest; never those of a file."""
    # No URI, name or number holds a zero byte, so the parts stay apart; a file's id is that of a JSON list.
    return hashlib.sha256("\0".join((kind, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def extension(uri: str) -> str:
    """With its dot, in small letters; empty if there is none."""
    name = uri.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and suffix else ""


def _root(uri: str, storage: Storage) -> _Root:
    entry = storage.stat(uri)
    if entry is None and storage.is_folder(uri):
        return _Root(uri=uri, kind="folder", entry=_not_there(uri))
    if _COMPRESSED.search(uri):
        raise ConfigError(
            f"input.uris: {shown(uri)} is compressed, and what is inside cannot be reached without unpacking all of "
            "it; store it uncompressed (audio is hardly smaller compressed)"
        )
    if entry is None and has_glob(uri):
        return _Root(uri=uri, kind="glob", entry=_not_there(uri))
    # What would be inside of a container that is not there cannot be counted, so it is no input either.
    if entry is None and (not re.search(r"\.\w*[a-zA-Z]\w*$", uri) or extension(uri) in {*_HOLD_AUDIO, *_NAME_AUDIO}):
        raise ConfigError(
            f"input.uris: there is no folder or file {shown(uri)}; check its spelling and your access to it"
        )
    return _Root(uri=uri, kind="file", entry=entry or _not_there(uri))


def _not_there(uri: str) -> FileEntry:
    return FileEntry(uri=normalise(uri), size_bytes=None, version="")


def _answered(uri: str, ask: Callable[[], _Root]) -> _Root:
    (root,) = _answering(uri, (ask() for _ in range(1)))
    return root


def _answering(uri: str, asked: Iterator[_T]) -> Iterator[_T]:
    """The same, with what the storage raises put as what it means for the user."""
    try:
        yield from asked
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"input.uris: {error}") from None
    except OSError as error:
        raise SystemFailure(f"input.uris: cannot list {shown(uri)}: {error}") from None


def _is_opened(uri: str, root: _Root) -> bool:
    """Whether a file stands for what is in it."""
    if uri.rpartition("/")[2].startswith(("_", ".")) and root.kind != "file":
        return False
    return extension(uri) in _HOLD_AUDIO or (extension(uri) in _NAME_AUDIO and _is_named(uri, root))


def _is_named(uri: str, root: _Root) -> bool:
    """Whether somebody said that this is such a container."""
    return root.kind == "file" or (root.kind == "glob" and extension(root.uri) == extension(uri))


def _found(entry: FileEntry) -> Found:
    id = source_id(entry.uri, entry.size_bytes, entry.version)
    return Found(source=Source(id=id, uri=entry.uri, size_bytes=entry.size_bytes), version=entry.version)


def _open_container(listed: FileEntry, storage: Storage, *, is_named: bool) -> Iterable[Found]:
    """What a tar or a Parquet file holds; reads all of its headers before it returns.

    Raises:
        ConfigError: it `is_named`, and has no audio column.
    """
    # Asked once more, because a listing may spell a version in another way, and the loader will compare it.
    entry = storage.stat(listed.uri)
    if entry is None:
        return [_broken(listed, f"{listed.uri} does not exist (any more)")]
    with storage.open(entry.uri) as file:
        if extension(entry.uri) == ".tar":
            return _members(entry, file)
        try:
            return _rows(entry, file, is_named=is_named)
        except pa.ArrowInvalid as error:
            return [_broken(entry, f"{entry.uri} is no Parquet file, or damaged: {error}")]


def _members(entry: FileEntry, file: BinaryIO) -> list[Found]:
    """The audio of a tar. Two recordings in one WebDataset sample are two inputs: neither may be dropped unseen."""
    found: list[Found] = []
    num_seen: Counter[str] = Counter()  # a tar may hold a name twice
    container_id = source_id(entry.uri, entry.size_bytes, entry.version)
    try:
        for _, sample in groupby(tar_entries(file), key=_sample_key):
            for member in _audio_of(list(sample)):
                found.append(_member(entry, member, container_id=container_id, occurrence=num_seen[member.name]))
                num_seen[member.name] += 1
    except InputError as error:
        found.append(_broken(entry, f"{entry.uri}: {error.message}"))
    return found


def _sample_key(member: TarEntry) -> str:
    """As WebDataset has it: the path up to the first dot of the file's name."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _audio_of(sample: Sequence[TarEntry]) -> list[TarEntry]:
    candidates = [member for member in sample if _kind_if_not_audio(member.name) is None]
    certain = [member for member in candidates if extension(member.name) in _AUDIO_EXTENSIONS]
    return certain or candidates


def _member(entry: FileEntry, member: TarEntry, *, container_id: str, occurrence: int) -> Found:
    place = TarMember(
        file_uri=entry.uri, file_version=entry.version, name=member.name, offset_bytes=member.offset_bytes
    )
    source = Source(
        id=inner_id("member", container_id, member.name, str(occurrence)),
        uri=f"{entry.uri}#{member.name}",
        size_bytes=member.size_bytes,
        place=place if member.fault is None else None,
        fault=member.fault,
    )
    return Found(source=source, version=entry.version)


def _rows(entry: FileEntry, file: BinaryIO, *, is_named: bool) -> Iterator[Found]:
    """The rows of a Parquet file; they are made one by one, there may be millions."""
    table = read_footer(file)
    column = table.audio
    if column is None and is_named:
        raise ConfigError(
            f"input.uris: {entry.uri} has no audio column, but {', '.join(table.columns)}; expected one marked as "
            "Audio by `datasets`, or one named audio, file or path that holds bytes or paths"
        )
    # Of a table found in a folder, paths alone are no reason to think that it is more than a list of what lies beside.
    if column is None or not (column.holds_bytes or is_named):
        return iter(())
    container_id = source_id(entry.uri, entry.size_bytes, entry.version)
    name = column.name
    starts = accumulate((num_rows for num_rows, _ in table.row_groups), initial=0)
    return (
        _row(entry, row, column=name, container_id=container_id, mean_bytes=mean_bytes)
        for start, (num_rows, mean_bytes) in zip(starts, table.row_groups, strict=False)
        for row in range(start, start + num_rows)
    )


def _row(entry: FileEntry, row: int, *, column: str, container_id: str, mean_bytes: int | None) -> Found:
    source = Source(
        id=inner_id("row", container_id, column, str(row)),
        uri=f"{entry.uri}#{row}",
        place=ParquetRow(file_uri=entry.uri, file_version=entry.version, column=column, row=row),
    )
    return Found(source=source, version=entry.version, mean_bytes=mean_bytes)


def _named_audio(line: NamedAudio) -> Found:
    start, duration = line.start_seconds, line.duration_seconds
    if start is None:
        source = Source(id=inner_id("named", line.uri), uri=line.uri)
    else:
        source = Source(
            id=inner_id("segment", line.uri, repr(start), repr(duration)),
            uri=f"{line.uri}#t={_seconds(start)}{'' if duration is None else f',{_seconds(start + duration)}'}",
            place=Segment(file_uri=line.uri, start_seconds=start, duration_seconds=duration),
        )
    return Found(source=source, version="", declared_seconds=duration)


def _bad_line(uri: str, line: BadLine) -> Found:
    # Known by what it says, not by where it stands: lines may be added above it.
    source = Source(
        id=inner_id("line", uri, line.sha256),
        uri=f"{uri}#{line.line}",
        fault=f"line {line.line} of {uri} {line.reason}; correct it, and run again",
    )
    return Found(source=source, version="")


def _broken(entry: FileEntry, fault: str) -> Found:
    id = inner_id("broken", source_id(entry.uri, entry.size_bytes, entry.version))
    return Found(source=Source(id=id, uri=entry.uri, size_bytes=entry.size_bytes, fault=fault), version=entry.version)


def _seconds(value: float) -> str:
    """12.0 -> 12, and 15.639999999999999 -> 15.64."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _written_by_us(folder: str, output_uri: str) -> tuple[str, ...]:
    """What the URIs of output start with: the output folder; or our names in it, if the input lies there too."""
    if not output_uri:
        return ()
    output = normalise(output_uri)
    if f"{folder}/".startswith(f"{output}/"):
        return (f"{join(output, '_kikitori')}/", part_uri(output, "").removesuffix(".parquet"))
    return (f"{output}/",)


def _kind_if_not_audio(uri: str) -> str | None:
    name = PurePosixPath(uri).name
    if name.startswith(("_", ".")):
        return f"{name[0]}*"
    return extension(uri) if extension(uri) in _NOT_AUDIO_EXTENSIONS else None


def _why_nothing(root: _Root, left_out: Counter[str]) -> str:
    uri = shown(root.uri)
    if root.kind == "file":
        return f"input.uris: there is no audio in {uri}; check how it was written"
    if not left_out:
        return f"input.uris: {uri} {'matches' if root.kind == 'glob' else 'holds'} no file; check its spelling"
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
    advice = "name the folder of the audio files"
    if left_out.keys() & _NAME_AUDIO.keys():
        advice += ", or the manifest itself if one of them names the audio"
    return f"input.uris: no audio in {uri}; found {left_out.total()} files that are not audio ({kinds}); {advice}"
