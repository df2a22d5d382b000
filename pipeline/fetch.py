"""A checkpoint's name -> a local folder that holds it: from the package, a folder, the hub or any fsspec URI."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import models
from models.checkpoint import Checkpoint, checkpoint_files, open_checkpoint
from models.config import FormatError
from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.storage import FileEntry, Storage, join, shown

DEMO = "demo"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_COPY_PREFIX = ".kikitori-"
_LEFTOVER_SECONDS = 24 * 3600.0  # copies this old are nobody's work any more
_DIGEST_BLOCK_BYTES = 16 * 2**10
_DIGEST_BLOCKS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A checkpoint on this machine."""

    folder: Path
    model_id: str  # as the user named it
    revision: str  # what it resolved to: a commit on the hub, a digest of the files elsewhere


def fetch(config: CheckpointConfig) -> Fetched:
    """Bring a checkpoint to this machine; costs nothing if it is here already.

    Raises:
        CheckpointError: it cannot be found or reached; the message says where we looked and what to do.
    """
    source = config.source
    if source == DEMO:
        folder = Path(models.__file__).parent / "demo" / "original"
        return Fetched(folder=folder, model_id=DEMO, revision=_digest(folder))
    if "://" in source and not source.startswith("file://"):
        folder = _download(source.rstrip("/"), Storage(config.storage_options))
        return Fetched(folder=folder, model_id=shown(source), revision=_digest(folder))
    local = Path(os.path.expanduser(source.removeprefix("file://")))  # Path.expanduser raises for an unknown user
    if local.is_dir():
        return _local(source, local.resolve())
    if not _HUB_ID.match(source) or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"checkpoint.source {source!r} is not a folder here, and not a hub id (org/name), a URI or `{DEMO}`"
        )
    return _from_hub(source, config.revision)


def open_fetched(fetched: Fetched) -> Checkpoint:
    """Read and check a fetched checkpoint: its configs, its tokenizer, the header of every tensor.

    Raises:
        CheckpointError: a file or tensor is missing or wrong; the message names it.
    """
    try:
        checkpoint = open_checkpoint(fetched.folder)
        checkpoint.load_tokenizer()
        return checkpoint
    except FormatError as error:
        raise CheckpointError(f"checkpoint {fetched.model_id}: {error}") from None


def cache_folder() -> Path:
    """Where checkpoints from fsspec URIs are kept; `KIKITORI_CACHE` moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kikitori"
    return Path(os.environ.get("KIKITORI_CACHE", default)) / "checkpoints"


def _local(source: str, folder: Path) -> Fetched:
    try:
        return Fetched(folder=folder, model_id=source, revision=_digest(folder))
    except OSError as error:
        raise CheckpointError(f"checkpoint {source} cannot be read: {error}; check its permissions") from None


def _from_hub(source: str, revision: str) -> Fetched:
    where = f"checkpoint {source} (revision {revision})"
    try:
        config = Path(hf_hub_download(source, "config.json", revision=revision))
        patterns = list(_patterns(json.loads(config.read_text(encoding="utf-8"))))
        # Pinned to the commit the config came from, so that a push in between cannot mix two revisions.
        commit = config.parent.name
        folder = Path(snapshot_download(source, revision=commit, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointError(f"{where} is gated: accept its terms on the hub, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: the hub knows no such repository, or it is private and HF_TOKEN is not set"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where}: the repository has no such revision") from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where} is not in the local hub cache and the hub cannot be reached ({error.__cause__ or error}). "
            f"Connect once and run `kikitori fetch`, or set checkpoint.source to a local folder, a URI, or `{DEMO}`"
        ) from None
    except EntryNotFoundError as error:
        raise CheckpointError(f"{where} lacks a file that a checkpoint needs: {error}") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(f"{where} could not be fetched: {error}") from None
    return Fetched(folder=folder, model_id=source, revision=commit)


def _download(uri: str, storage: Storage) -> Path:
    """Copy the files of a checkpoint into the cache, whole or not at all."""
    wanted = _list(uri, storage)
    stamp = json.dumps([uri, [(name, wanted[name].size_bytes, wanted[name].version) for name in sorted(wanted)]])
    folder = cache_folder() / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    if not folder.exists():
        try:
            _copy(wanted, storage, folder)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {shown(uri)} could not be copied to {folder.parent}: {error}; "
                "KIKITORI_CACHE names another folder for it"
            ) from None
    return folder


def _list(uri: str, storage: Storage) -> dict[str, FileEntry]:
    """The files of a checkpoint by name; what lies in folders below belongs to something else."""
    try:
        config = json.loads(storage.read_bytes(join(uri, "config.json")))
        entries = {entry.uri.removeprefix(join(uri, "")): entry for entry in storage.list_files(uri)}
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {shown(uri)}: there is no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {shown(uri)} could not be read: {error}") from None
    return {
        name: entry
        for name, entry in entries.items()
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in _patterns(config))
    }


def _patterns(config: Any) -> tuple[str, ...]:
    """What to bring; of a config that is none, itself alone: opening it says what is wrong."""
    return checkpoint_files(config) if isinstance(config, dict) else ("config.json",)


def _copy(wanted: Mapping[str, FileEntry], storage: Storage, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_COPY_PREFIX) as temporary:
        target = Path(temporary) / "checkpoint"
        target.mkdir()
        for name, entry in wanted.items():
            with (target / name).open("w+b") as out:
                storage.download(entry.uri, out)
                if entry.size_bytes not in (None, out.tell()):
                    raise OSError(f"{shown(entry.uri)} changed from {entry.size_bytes} to {out.tell()} bytes meanwhile")
        try:
            target.rename(folder)
        except OSError:  # another process on this machine was first; its copy is as good
            if not folder.exists():
                raise


def _remove_leftovers(cache: Path) -> None:
    """Copies of gigabytes that killed processes did not get to finish."""
    for path in cache.glob(f"{_COPY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _digest(folder: Path) -> str:
    """12 hex digits naming the content of a folder: every file's name and size, and of its content all up to 64 MiB.

    Of larger files, blocks all through: reading 5 GB at every start would take many seconds, and training moves every
    tensor. A change smaller than the gaps between the blocks (about 1 MiB) can escape.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in {".json", ".safetensors", ".model"}):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            for offset in _digested_offsets(path.stat().st_size):
                file.seek(offset)
                digest.update(file.read(_DIGEST_BLOCK_BYTES))
    return digest.hexdigest()[:12]


def _digested_offsets(size_bytes: int) -> range:
    """Where the digest reads: every block of a small file, every so many of a large one."""
    num_blocks = -(-size_bytes // _DIGEST_BLOCK_BYTES)
    stride = max(1, num_blocks // _DIGEST_BLOCKS)
    return range(0, size_bytes, stride * _DIGEST_BLOCK_BYTES)


def describe(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The facts of a checkpoint that a person wants to see before using it."""
    decoder, mimi, speech = checkpoint.decoder, checkpoint.mimi, checkpoint.speech
    return {
        "format": checkpoint.format,
        "decoder": f"{decoder.num_layers} layers, {decoder.num_heads} heads, dim {decoder.dim}",
        "context_seconds": decoder.context / mimi.frame_rate_hz,
        "codebooks": f"{decoder.num_codebooks} of {decoder.audio_card}",
        "text_ids": decoder.text_card,
        "prefix_seconds": speech.prefix_seconds,
        "delay_seconds": speech.delay_seconds,
        "voice_activity_heads": decoder.num_extra_heads,
    }
