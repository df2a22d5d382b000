"""URIs -> sources: which files are inputs, and which are plainly not audio. Storage is listed, nothing is read."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import ConfigError, SystemFailure
from pipeline.messages import Source
from pipeline.storage import FileEntry, Storage, has_glob, join, normalise
from pipeline.write import part_uri

# Extensions are not believed: what is not listed here is tried, since audio skipped in silence is lost.
_NOT_AUDIO = """
    txt md rst rtf doc docx xls xlsx ppt pptx pdf html htm css js json jsonl csv tsv parquet arrow feather xml yaml yml
    toml ini cfg conf env png jpg jpeg gif svg webp bmp tif tiff heic ico py pyc ipynb sh bat log out err srt vtt ass
    ssa sbv lrc lab textgrid eaf stm ctm rttm trn m3u m3u8 pls cue npz npy pt pth ckpt safetensors onnx pkl h5 hdf5 db
    sqlite zip gz bz2 xz zst 7z rar tar tgz md5 sha1 sha256 lock
"""
_NOT_AUDIO_EXTENSIONS = frozenset(f".{name}" for name in _NOT_AUDIO.split())
_CONTAINERS = (".parquet", ".jsonl", ".tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An input as the listing saw it; `version` changes when its content does, and is empty if it is not there."""

    source: Source
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What the configured URIs hold, in order of URI."""

    found: tuple[Found, ...]
    ignored: Mapping[str, int]  # extension with its dot (or `_*`, by name) -> files that are plainly not audio


def source_id(uri: str, size_bytes: int | None, version: str) -> str:
    """32 hex digits: the same for the same input in any run, another one once it has changed."""
    # JSON keeps the three apart, and takes file names that are not UTF-8.
    return hashlib.sha256(json.dumps([normalise(uri), size_bytes, version]).encode()).hexdigest()[:32]


def extension(uri: str) -> str:
    """With its dot, in small letters; empty if there is none."""
    return PurePosixPath(uri).suffix.lower()


def discover(uris: Sequence[str], storage: Storage, *, output_uri: str = "") -> Discovery:
    """List folders, globs and single files; a file reached twice is one input. The output is never taken as input.

    A file named by itself is always an input, even if it does not exist: it will have its row.

    Raises:
        ConfigError: nothing to list, a folder or glob without audio, or a container that cannot be read yet.
        SystemFailure: the storage does not answer.
    """
    if not uris:
        raise ConfigError("input.uris is empty; name at least one folder, glob or file, e.g. s3://bucket/audio/")
    found: dict[str, Found] = {}
    ignored: dict[str, str] = {}
    for uri in uris:
        here, left_out = _list_audio(uri, storage, output_uri=output_uri)
        ignored |= left_out
        for one in here:
            found.setdefault(one.source.uri, one)
    kinds = Counter(kind for uri, kind in ignored.items() if uri not in found)
    return Discovery(found=tuple(found[uri] for uri in sorted(found)), ignored=dict(kinds.most_common()))


def _list_audio(uri: str, storage: Storage, *, output_uri: str) -> tuple[list[Found], dict[str, str]]:
    """The inputs that one URI stands for; and by URI, the kind of every file that is left out."""
    try:
        entry = storage.stat(uri)
        if entry is None and storage.is_folder(uri):
            return _sort_out(uri, storage, written_by_us=_written_by_us(normalise(uri), output_uri))
        _refuse_container(uri)
        if entry is None and has_glob(uri):
            above = re.split(r"[*?\[]", normalise(uri), maxsplit=1)[0].rpartition("/")[0]
            return _sort_out(uri, storage, written_by_us=_written_by_us(above, output_uri))
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"input.uris: {error}") from None
    except OSError as error:
        raise SystemFailure(f"input.uris: cannot list {error}") from None
    if entry is None and not re.search(r"\.\w*[a-zA-Z]\w*$", uri):
        raise ConfigError(f"input.uris: there is no folder or file {uri}; check its spelling and your access to it")
    return [_found(entry or FileEntry(uri=normalise(uri), size_bytes=None, version=""))], {}


def _sort_out(uri: str, storage: Storage, *, written_by_us: tuple[str, ...]) -> tuple[list[Found], dict[str, str]]:
    """The files of a folder or glob: inputs, and what is plainly not audio."""
    found: list[Found] = []
    left_out: dict[str, str] = {}
    for entry in storage.list_files(uri):
        if entry.uri.startswith(written_by_us):
            continue
        kind = _kind_if_not_audio(entry.uri)
        if kind is None:
            found.append(_found(entry))
        else:
            left_out[entry.uri] = kind
    if not found:
        raise ConfigError(_why_nothing(uri, Counter(left_out.values())))
    return found, left_out


def _found(entry: FileEntry) -> Found:
    id = source_id(entry.uri, entry.size_bytes, entry.version)
    return Found(source=Source(id=id, uri=entry.uri, size_bytes=entry.size_bytes), version=entry.version)


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


def _refuse_container(uri: str) -> None:
    if uri.lower().endswith(_CONTAINERS):
        raise ConfigError(
            f"input.uris: {uri} is a container ({', '.join(_CONTAINERS)}), and these cannot be read yet; "
            "unpack it, and name the folder of its audio files"
        )


def _why_nothing(uri: str, kinds: Counter[str]) -> str:
    if not kinds:
        return f"input.uris: {uri} {'matches no file' if has_glob(uri) else 'holds no file'}; check its spelling"
    left_out = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    advice = "unpack the containers first" if kinds.keys() & set(_CONTAINERS) else "name the folder of the audio files"
    return f"input.uris: no audio in {uri}; found {kinds.total()} files that are not audio ({left_out}); {advice}"
