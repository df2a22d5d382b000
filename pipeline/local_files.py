"""Files on this machine: what `Storage` does for local paths. Every path here is absolute and plain."""

import errno
import fcntl
import heapq
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress

from pipeline.failpoints import failpoint

_TEMPORARY = re.compile(r"\.kikitori-[0-9a-f]{32}\.tmp")
_LOCK_NAME = ".kikitori-lock"
_NAMES_AT_ONCE = 200_000  # of one folder held in memory; a larger folder is read several times
# What file systems without hard links say (FAT, SMB, many in user space), and Linux where they are forbidden.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
_ADVICE = {
    errno.ENOSPC: "free some space and run again; what is committed stays",
    errno.EDQUOT: "the quota is used up: free some space and run again; what is committed stays",
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no file of this size",
    errno.EROFS: "it is mounted read-only: choose another place",
    errno.EACCES: "give this process the right to write there, or choose another place",
    errno.EPERM: "give this process the right to write there, or choose another place",
    errno.ENAMETOOLONG: "choose a place with a shorter path",
    errno.EIO: "the disk or the network behind it is failing",
    errno.ESTALE: "the network file system was taken away meanwhile",
}


def temporary_name() -> str:
    """A new name that no listing shows, so one that a killed process left behind is never taken for a result."""
    return f".kikitori-{uuid.uuid4().hex}.tmp"


def is_temporary(name: str) -> bool:
    """Whether it is one of our temporary names."""
    return _TEMPORARY.fullmatch(name) is not None


def stat_file(path: str) -> os.stat_result | None:
    """None where there is no regular file: reading a pipe or a device might never end."""
    try:
        status = os.stat(path)
    except OSError as error:
        # ELOOP: a link that leads to itself. A name that is too long is that of no file.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


def walk(
    root: str, *, enters: Callable[[str], bool] = lambda folder: True
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every file below `root`, hidden ones too, in the order of their paths; links to folders are not followed.

    Those could lead in circles. The status is None for a link that leads nowhere: somebody meant it as an input, so it
    must not vanish. `enters` is asked with the path below `root` of every folder.

    Raises:
        OSError: a folder cannot be read; it is not left out without a word.
    """
    folders = [_names(root)]  # by hand, not by recursion: paths can be deeper than Python's stack
    while folders:
        path = next(folders[-1], None)
        if path is None:
            folders.pop()
        elif not path.endswith("/"):
            status = stat_file(path)
            if status is not None or not os.path.exists(path):
                yield path, status
        elif enters(os.path.relpath(path, root)):
            folders.append(_names(path.rstrip("/")))


def create(path: str, data: bytes) -> bool:
    """Write a file that must not exist yet, whole or not at all; False if it did exist.

    `link` is the one call that both publishes a finished file at once and refuses to replace another. Where the file
    system has none, a lock in the folder keeps writers apart instead.
    """
    with _advised(path), _written_beside(path, data) as temporary:
        try:
            created = _link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            created = _rename_locked(temporary, path)
        if not created and not os.path.isfile(path):
            raise OSError(f"{path}: cannot be created, something that is not a file is in its way; move it away")
        if created:
            _sync_folder(os.path.dirname(path))
    return created


def overwrite(path: str, data: bytes) -> None:
    """Replace a file; readers see the old content or the new, never a mixture."""
    with _advised(path), _written_beside(path, data) as temporary:
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))


def remove_leftovers(root: str, *, older_than_seconds: float) -> int:
    """Remove the temporary files that killed processes left below `root`; -> how many.

    Young ones are kept: they may be somebody's work, and clocks differ.
    """
    removed = 0
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names if is_temporary(name)):
            with suppress(OSError):  # another process is cleaning too; what stays harms nobody
                if time.time() - os.lstat(path).st_mtime > older_than_seconds:
                    os.unlink(path)
                    removed += 1
    return removed


def missing_folders(folder: str) -> list[str]:
    """`folder` and those above it that do not exist yet, deepest first."""
    missing: list[str] = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def remove_empty(folders: Iterable[str]) -> None:
    """Remove these folders, in order, up to the first that is in use."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:  # another process has put something there meanwhile
            return


def _names(folder: str) -> Iterator[str]:
    """The paths of what is in a folder, in the order of all paths below: so folders sort, and come, with a slash."""
    base = folder.rstrip("/") + "/"
    last = ""
    while True:
        with os.scandir(folder) as entries:
            paths = (base + entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in entries)
            batch = heapq.nsmallest(_NAMES_AT_ONCE, (path for path in paths if path > last))
        yield from batch
        if len(batch) < _NAMES_AT_ONCE:
            return
        last = batch[-1]


def _link(temporary: str, path: str) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # On NFS an answer can be lost; the kernel asks again, and finds the link it made.
        return os.path.isfile(path) and os.path.samefile(temporary, path)
    return True


def _rename_locked(temporary: str, path: str) -> bool:
    with _locked(os.path.dirname(path)):
        if os.path.lexists(path):
            return False
        os.rename(temporary, path)
    return True


@contextmanager
def _locked(folder: str) -> Generator[None]:
    """One process at a time; a killed one lets go. The lock's file is gone afterwards.

    Raises:
        OSError: the file system has no locks either.
    """
    path = os.path.join(folder, _LOCK_NAME)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            if not _is_open(descriptor, path):  # its last holder has removed it meanwhile
                continue
            try:
                yield
            finally:
                os.unlink(path)
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise OSError(
            f"{folder}: this file system has neither hard links nor locks ({error.strerror}), so two runs could "
            "overwrite each other's results; choose another place"
        ) from None


def _is_open(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _written_beside(path: str, data: bytes) -> Generator[str]:
    """A temporary file with this content in the folder of `path`, on disk for good; gone afterwards."""
    temporary = os.path.join(_make_folder(os.path.dirname(path)), temporary_name())
    try:
        with open(temporary, "xb") as file:
            failpoint("local.before-write")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        failpoint("local.before-publish")
        yield temporary
        failpoint("local.after-publish")
    finally:
        with suppress(FileNotFoundError):  # a rename has moved it, a link has not
            os.unlink(temporary)


@contextmanager
def _advised(path: str) -> Generator[None]:
    """Errors from within name `path` instead of a temporary file, and say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise OSError(error.errno, f"{error.strerror}; {_ADVICE[error.errno]}", path) from None


def _make_folder(folder: str) -> str:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # would read as "the file exists already"
        raise NotADirectoryError(f"{folder} is a file, not a folder") from None
    return folder


def _sync_folder(folder: str) -> None:
    """Make a new name survive a power cut, where that can be had: the file is there already and must not be denied."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
