import os
import subprocess
import sys
import threading
from pathlib import Path

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
