"""Files on this machine: what `Storage` does for local paths. Every path here is absolute and plain."""

import os
import stat
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager


def temporary_name() -> str:
    """A new name that no listing shows, so one that a killed process left behind is never taken for a result."""
    return f".{uuid.uuid4().hex}.tmp"


def stat_file(path: str) -> os.stat_result | None:
    """None where there is no regular file: reading a pipe or a device might never end."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def walk(root: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every file below `root`, hidden ones too; links to folders are not followed, they could lead in circles.

    The status is None for a link that leads nowhere: somebody meant it as an input, so it must not vanish.

    Raises:
        OSError: a folder cannot be read; `os.walk` alone would leave it out without a word.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=fail):
        for path in (os.path.join(folder, name) for name in names):
            status = stat_file(path)
            if status is not None or not os.path.exists(path):
                yield path, status


def create(path: str, data: bytes) -> bool:
    """Write a file that must not exist yet, whole or not at all; False if it did exist.

    `link` is the one call that both publishes a finished file at once and refuses to replace another.
    """
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    _sync_folder(os.path.dirname(path))
    return True


def overwrite(path: str, data: bytes) -> None:
    """Replace a file; readers see the old content or the new, never a mixture."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)
    _sync_folder(os.path.dirname(path))


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


@contextmanager
def _written_beside(path: str, data: bytes) -> Generator[str]:
    """A temporary file with this content in the folder of `path`, on disk for good; gone afterwards."""
    temporary = os.path.join(_make_folder(os.path.dirname(path)), temporary_name())
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.lexists(temporary):  # a replace has moved it, a link has not
            os.unlink(temporary)


def _make_folder(folder: str) -> str:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # would read as "the file exists already"
        raise NotADirectoryError(f"{folder} is a file, not a folder") from None
    return folder


def _sync_folder(folder: str) -> None:
    """Make a new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
