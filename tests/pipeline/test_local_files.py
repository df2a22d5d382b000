import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import local_files
from pipeline.storage import Storage


def test_of_many_writers_exactly_one_creates_and_all_see_it_whole(tmp_path: Path) -> None:
    path = f"{tmp_path}/deep/race"
    results: list[bool] = []
    start = threading.Barrier(16)

    def write(number: int) -> None:
        start.wait()
        results.append(local_files.create(path, bytes([number]) * 100_000))
        content = Path(path).read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert sum(results) == 1
    assert os.listdir(tmp_path / "deep") == ["race"]


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    local_files.create(f"{tmp_path}/a", b"1")
    local_files.create(f"{tmp_path}/a", b"2")
    local_files.overwrite(f"{tmp_path}/a", b"3")
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_leaves_behind_is_never_listed(tmp_path: Path) -> None:
    script = (  # dies after its temporary file is on disk, before the file has its name
        "import os, sys; from pipeline import local_files; os.link = lambda *_: os._exit(9); "
        "local_files.create(sys.argv[1], b'half a thought')"
    )
    killed = subprocess.run([sys.executable, "-c", script, f"{tmp_path}/part.parquet"], check=False)
    assert killed.returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".")
    assert left.endswith(".tmp")
    assert list(Storage().list_files(str(tmp_path))) == []
    assert list(Storage().list_files(f"{tmp_path}/*")) == []
    assert local_files.create(f"{tmp_path}/part.parquet", b"whole")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_files.create(f"{tmp_path}/a", b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for write in (local_files.create, local_files.overwrite):
        with pytest.raises(OSError, match="No space"):
            write(f"{tmp_path}/a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_parent_that_is_a_file_is_not_taken_for_an_existing_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (f"{tmp_path}/file/a", f"{tmp_path}/file/b/a"):
        with pytest.raises(NotADirectoryError):
            local_files.create(path, b"")


def test_walking_shows_every_regular_file_once(tmp_path: Path) -> None:
    for name in ("a", ".hidden", "d/b", "d/e/c"):
        local_files.create(f"{tmp_path}/{name}", b"")
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = {os.path.relpath(path, tmp_path): status for path, status in local_files.walk(str(tmp_path))}
    assert sorted(found) == [".hidden", "a", "d/b", "d/e/c", "dangling", "link"]
    assert [name for name, status in found.items() if status is None] == ["dangling"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(local_files.walk(f"{tmp_path}/missing"))


def test_only_empty_folders_are_removed(tmp_path: Path) -> None:
    missing = local_files.missing_folders(f"{tmp_path}/a/b/c")
    assert missing == [f"{tmp_path}/a/b/c", f"{tmp_path}/a/b", f"{tmp_path}/a"]
    local_files.create(f"{tmp_path}/a/b/c/x", b"")
    local_files.create(f"{tmp_path}/a/y", b"")
    os.unlink(f"{tmp_path}/a/b/c/x")
    local_files.remove_empty(missing)
    assert os.listdir(tmp_path / "a") == ["y"]


def test_paths_of_a_walk_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/z", "a!", "a-b", "a.wav", "a b/c", "ab", "é", "😀", os.fsdecode(b"latin-\xe9"), ".h/x", "Z"]
    for name in names:
        local_files.create(f"{tmp_path}/{name}", b"")
    expected = sorted(f"{tmp_path}/{name}" for name in names)
    assert [path for path, _ in local_files.walk(str(tmp_path))] == expected
    monkeypatch.setattr(local_files, "_NAMES_AT_ONCE", 2)  # as in a folder of millions
    assert [path for path, _ in local_files.walk(str(tmp_path))] == expected


def test_a_walk_is_lazy_and_enters_only_where_it_is_told_to(tmp_path: Path) -> None:
    for name in ("a/b/c", "d/e", "f"):
        local_files.create(f"{tmp_path}/{name}", b"")
    asked: list[str] = []

    def enters(folder: str) -> bool:
        asked.append(folder)
        return folder == "a"

    found = local_files.walk(str(tmp_path), enters=enters)
    assert asked == []
    assert [path for path, _ in found] == [f"{tmp_path}/f"]
    assert asked == ["a", "a/b", "d"]


def test_folders_deeper_than_the_stack_are_walked(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for _ in range(sys.getrecursionlimit() + 100):
        folder += "/x"
        os.mkdir(folder)
    try:
        local_files.create(f"{folder}/a", b"")
        assert [path for path, _ in local_files.walk(str(tmp_path))] == [f"{folder}/a"]
    finally:
        subprocess.run(["rm", "-r", tmp_path / "x"], check=True)  # Python's own would need a deeper stack


def test_a_link_to_itself_and_a_name_that_is_too_long_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert local_files.stat_file(f"{tmp_path}/loop") is None
    assert local_files.stat_file(f"{tmp_path}/{'x' * 300}") is None
    assert [(path, status) for path, status in local_files.walk(str(tmp_path))] == [(f"{tmp_path}/loop", None)]


def test_names_that_are_not_utf8_are_written_and_read(tmp_path: Path) -> None:
    path = f"{tmp_path}/{os.fsdecode(bytes([0xE9, 0xFF]))}.wav"
    assert local_files.create(path, b"1")
    assert not local_files.create(path, b"2")
    local_files.overwrite(path, b"3")
    assert Storage().read_bytes(path) == b"3"
    assert [entry.uri for entry in Storage().list_files(str(tmp_path))] == [path]


# --- places that refuse

LIMITED = """
import resource, sys
from pipeline import local_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    getattr(local_files, sys.argv[1])(sys.argv[2], b"x" * 5000)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("write", ["create", "overwrite"])
def test_a_file_that_is_too_big_leaves_nothing(tmp_path: Path, write: str) -> None:
    command = [sys.executable, "-c", LIMITED, write, f"{tmp_path}/part"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "File too large" in said
    assert "ulimit -f" in said
    assert f"{tmp_path}/part" in said
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("write", [local_files.create, local_files.overwrite])
def test_a_full_disk_keeps_what_it_had_and_says_what_to_do(small_disk: Path, write: Callable[..., Any]) -> None:
    path = f"{small_disk}/part"
    local_files.create(path + "-old", b"old")
    with pytest.raises(OSError, match=r"No space left on device; free some space and run again.*/disk/part'"):
        write(path, b"x" * 100_000)
    assert os.listdir(small_disk) == ["part-old"]
    assert write(path, b"x" * 10_000) is not False


@pytest.fixture
def nobody() -> Iterator[None]:
    """Not root, whom nothing is refused."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("write", [local_files.create, local_files.overwrite])
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, nobody: None, write: Callable[..., Any]) -> None:
    with pytest.raises(PermissionError, match="give this process the right to write there, or choose another place"):
        write("/usr/kikitori-part", b"")
    with pytest.raises(PermissionError, match="give this process the right"):
        write("/root-of-nobody/deep/part", b"")


def test_an_unreadable_input_is_denied_not_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a/x.wav").touch()
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            _assert_denied(tmp_path)
        finally:
            os.seteuid(0)
    else:
        (tmp_path / "a").chmod(0)
        _assert_denied(tmp_path)


def _assert_denied(folder: Path) -> None:
    for ask in (local_files.stat_file, lambda path: list(local_files.walk(os.path.dirname(path)))):
        with pytest.raises(PermissionError):
            ask(f"{folder}/a/x.wav")


@pytest.mark.parametrize("write", [local_files.create, local_files.overwrite])
def test_a_folder_in_the_place_of_a_file_is_not_taken_for_a_result(tmp_path: Path, write: Callable[..., Any]) -> None:
    """`create` said "there already" of a folder, and of a link that leads nowhere."""
    (tmp_path / "part").mkdir()
    with pytest.raises(OSError, match=r"in its way|directory"):
        write(f"{tmp_path}/part", b"")
    assert os.listdir(tmp_path) == ["part"]


def test_a_link_that_leads_nowhere_is_not_taken_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "part").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="in its way"):
        local_files.create(f"{tmp_path}/part", b"")
    assert os.listdir(tmp_path) == ["part"]


@pytest.mark.parametrize("write", [local_files.create, local_files.overwrite])
def test_a_name_that_is_too_long_leaves_nothing(tmp_path: Path, write: Callable[..., Any]) -> None:
    with pytest.raises(OSError, match="File name too long; choose a place with a shorter path"):
        write(f"{tmp_path}/{'x' * 300}", b"")
    assert os.listdir(tmp_path) == []


# --- file systems that lack something

NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]


def refusing(code: int) -> Callable[..., None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", NO_LINKS)
def test_without_links_creating_is_still_whole_and_once(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(code))
    for round_number in range(20):
        path, start = f"{tmp_path}/race-{round_number}", threading.Barrier(8)

        def write(number: int, path: str = path, start: threading.Barrier = start) -> bool:
            start.wait()
            return local_files.create(path, bytes([number]) * 10_000)

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(write, range(8)))
        assert sum(results) == 1
        assert Path(path).read_bytes() == bytes([results.index(True)]) * 10_000
    assert len(os.listdir(tmp_path)) == 20


WITHOUT_LINKS = """
import os, sys, errno
from pipeline import local_files
def refuse(*args): raise OSError(errno.EPERM, "no links")
os.link = refuse
print(sum(local_files.create(f"{sys.argv[1]}/{number}", sys.argv[2].encode() * 1000) for number in range(200)))
"""


def test_without_links_processes_are_kept_apart_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_LINKS, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE) for number in range(3)]
    created = [int(writer.communicate(timeout=60)[0]) for writer in writers]
    assert sum(created) == 200
    contents = [(tmp_path / str(number)).read_bytes() for number in range(200)]
    assert [contents.count(str(number).encode() * 1000) for number in range(3)] == created
    assert len(os.listdir(tmp_path)) == 200


def test_a_killed_holder_of_the_lock_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys, errno; from pipeline import local_files\n"
        "def refuse(*args): raise OSError(errno.EPERM, 'no links')\n"
        "os.link = refuse; os.rename = lambda *_: os._exit(9); local_files.create(sys.argv[1], b'half')"
    )
    assert subprocess.run([sys.executable, "-c", script, f"{tmp_path}/part"], check=False).returncode == 9
    assert list(Storage().list_files(str(tmp_path))) == []
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    assert local_files.create(f"{tmp_path}/part", b"whole")
    assert local_files.remove_leftovers(str(tmp_path), older_than_seconds=-1) == 1
    assert os.listdir(tmp_path) == ["part"]


def test_without_links_and_locks_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(local_files.fcntl, "flock", refusing(errno.ENOLCK))
    with pytest.raises(OSError, match=r"neither hard links nor locks .*choose another place"):
        local_files.create(f"{tmp_path}/part", b"")
    assert not (tmp_path / "part").exists()
    local_files.overwrite(f"{tmp_path}/part", b"")


def test_a_link_whose_answer_was_lost_is_known_as_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again when an answer is lost, and hears that the name exists."""
    link = os.link

    def link_twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert local_files.create(f"{tmp_path}/part", b"ours")
    assert not local_files.create(f"{tmp_path}/part", b"ours")


def test_a_folder_that_cannot_be_synced_has_its_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was there, and its writer was told it was not."""
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert local_files.create(f"{tmp_path}/part", b"1")
    local_files.overwrite(f"{tmp_path}/part", b"2")


# --- leftovers


def test_only_old_leftovers_of_ours_are_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    old, young = (tmp_path / "data" / local_files.temporary_name() for _ in range(2))
    others = [tmp_path / "data" / name for name in (".keep", "x.tmp", ".0123.tmp", "part.parquet", ".kikitori-x.tmp")]
    for path in (old, young, *others):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    os.utime(young)
    assert local_files.remove_leftovers(str(tmp_path), older_than_seconds=3600) == 1
    assert sorted(os.listdir(tmp_path / "data")) == sorted(path.name for path in (young, *others))
    assert local_files.remove_leftovers(f"{tmp_path}/missing", older_than_seconds=0) == 0


@pytest.fixture
def with_leftovers(tmp_path: Path) -> Path:
    """A folder of one part, and of what killed processes left."""
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "part-1.parquet")
    (tmp_path / local_files.temporary_name()).write_bytes(b"half a part")
    (tmp_path / ".kikitori-lock").touch()
    return tmp_path


def test_pyarrow_does_not_see_leftovers(with_leftovers: Path) -> None:
    assert pq.read_table(with_leftovers).num_rows == 2


def test_pandas_does_not_see_leftovers(with_leftovers: Path) -> None:
    assert len(pytest.importorskip("pandas").read_parquet(with_leftovers)) == 2


@pytest.mark.parametrize("pattern", ["*.parquet", "**/*.parquet"])
def test_duckdb_does_not_see_leftovers(with_leftovers: Path, pattern: str) -> None:
    found = pytest.importorskip("duckdb").sql(f"select count(*) from read_parquet('{with_leftovers}/{pattern}')")
    assert found.fetchall()[0] == (2,)
