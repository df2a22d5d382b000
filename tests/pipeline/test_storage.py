import os
import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from pipeline import retries
from pipeline.errors import ConfigError
from pipeline.storage import Storage, has_glob, is_local, join, normalise


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that does not exist yet, once on every kind of storage that needs no server."""
    if request.param == "memory":
        uri = f"memory://{uuid.uuid4().hex}"
        yield uri
        fs = fsspec.filesystem("memory")
        if fs.exists(uri):
            fs.rm(uri, recursive=True)
        return
    yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/data"


def uris(storage: Storage, uri: str) -> list[str]:
    return [entry.uri for entry in storage.list_files(uri)]


# --- names


@given(st.text(alphabet="ab./ [*", min_size=1, max_size=12))
def test_a_normal_uri_is_its_own_normal_form(path: str) -> None:
    for uri in (path, f"file://{path}", f"s3://bucket/{path}", f"memory://{path}"):
        assert normalise(normalise(uri)) == normalise(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b.wav", "/a/b.wav"),
        ("/a//b/../c.wav", "/a/c.wav"),
        ("file:///a/b.wav", "/a/b.wav"),
        ("local:///a/b/", "/a/b"),
        ("/a/b/", "/a/b"),
        ("s3://bucket/key/", "s3://bucket/key"),
        ("s3://bucket/a//b", "s3://bucket/a//b"),  # a key of its own, not the same as a/b
        ("memory:///x/y", "memory://x/y"),
    ],
)
def test_the_same_file_has_one_uri(uri: str, expected: str) -> None:
    assert normalise(uri) == expected


def test_relative_and_home_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert normalise("a.wav") == f"{tmp_path}/a.wav"
    assert normalise("~/a.wav") == "/home/someone/a.wav"


@pytest.mark.parametrize("uri", ["a\0b.wav", "a\ud800.wav", "s3://bucket/a\0b"])
def test_a_name_no_file_can_have_is_a_missing_file(uri: str) -> None:
    with pytest.raises(FileNotFoundError, match="no file name can hold"):
        Storage().open(uri)


def test_join() -> None:
    assert join("s3://bucket/out/", "data", "part.parquet") == "s3://bucket/out/data/part.parquet"
    assert join("/", "a") == "/a"
    assert join("s3://bucket", "/data/") == "s3://bucket/data"


def test_is_local_and_has_glob() -> None:
    assert is_local("a/b")
    assert is_local("file:///a")
    assert not is_local("s3://bucket/a")
    assert has_glob("s3://bucket/*.wav")
    assert not has_glob("s3://bucket/a.wav")


# --- reading and writing


@given(data=st.binary(max_size=200))
def test_what_is_created_is_what_is_read(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    for base in (str(tmp_path_factory.mktemp("x")), f"memory://{uuid.uuid4().hex}"):
        storage, uri = Storage(), join(base, "a/b")
        assert storage.create(uri, data)
        assert storage.read_bytes(uri) == data
        with storage.open(uri) as file:
            assert file.read() == data
        entry = storage.stat(uri)
        assert entry is not None
        assert entry.size_bytes == len(data)


def test_create_never_replaces(folder: str) -> None:
    storage, uri = Storage(), join(folder, "a")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second")
    assert not storage.create(uri, b"first")
    assert storage.read_bytes(uri) == b"first"


def test_overwrite_replaces_and_delete_removes(folder: str) -> None:
    storage, uri = Storage(), join(folder, "a")
    storage.overwrite(uri, b"first")
    first = storage.stat(uri)
    storage.overwrite(uri, b"second, longer")
    assert storage.read_bytes(uri) == b"second, longer"
    assert storage.stat(uri) != first
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(uri)


def test_of_many_writers_exactly_one_creates(folder: str) -> None:
    storage, uri = Storage(), join(folder, "race")
    contents = [bytes([number]) * 100_000 for number in range(16)]
    start, results = threading.Barrier(16), [False] * 16

    def write(number: int) -> None:
        start.wait()
        results[number] = storage.create(uri, contents[number])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 1
    assert storage.read_bytes(uri) == contents[results.index(True)]
    assert uris(storage, folder) == [normalise(uri)]


def test_readers_of_one_file_do_not_share_a_position(folder: str) -> None:
    storage, uri = Storage(), join(folder, "a")
    storage.create(uri, b"0123456789")
    with storage.open(uri) as one, storage.open(uri) as other:
        assert one.read(4) == b"0123"
        assert other.read(2) == b"01"
        assert one.seek(-1, os.SEEK_END) == 9
        assert one.read() == b"9"


def test_a_missing_file(folder: str) -> None:
    storage, uri = Storage(), join(folder, "missing.wav")
    assert storage.stat(uri) is None
    assert not storage.exists(uri)
    assert not storage.is_folder(uri)
    with pytest.raises(FileNotFoundError):
        storage.open(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        uris(storage, uri)
    with pytest.raises(FileNotFoundError):
        uris(storage, folder)


# --- listing


def test_a_folder_lists_recursively_sorted_without_hidden_files(folder: str) -> None:
    storage = Storage()
    for name in ("b.wav", "a/z.wav", "a.wav", ".hidden.wav", ".cache/x.wav", "a/.y.wav"):
        storage.create(join(folder, name), name.encode())
    root = normalise(folder)
    assert uris(storage, folder) == [f"{root}/a.wav", f"{root}/a/z.wav", f"{root}/b.wav"]
    assert uris(storage, folder + "/") == uris(storage, folder)
    assert storage.is_folder(folder)
    assert storage.stat(folder) is None


def test_an_entry_is_the_same_in_a_listing_and_alone(folder: str) -> None:
    storage, uri = Storage(), join(folder, "a.wav")
    storage.create(uri, b"123")
    (entry,) = storage.list_files(folder)
    assert entry == storage.stat(uri)
    assert list(storage.list_files(uri)) == [entry]
    assert entry.size_bytes == 3
    assert entry.version


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.wav", ["a.wav", "b.wav"]),
        ("?.wav", ["a.wav", "b.wav"]),
        ("[b-z].wav", ["b.wav"]),
        ("*/*.wav", ["d/c.wav"]),
        ("**/*.wav", ["a.wav", "b.wav", "d/c.wav", "d/e/f.wav"]),
        ("**", ["a.wav", "b.wav", "c.txt", "d/c.wav", "d/e/f.wav"]),
        (".*", [".h.wav"]),
        ("*.flac", []),
        ("missing/*.wav", []),
    ],
)
def test_globs(folder: str, pattern: str, expected: list[str]) -> None:
    storage = Storage()
    for name in ("a.wav", "b.wav", "c.txt", ".h.wav", "d/c.wav", "d/e/f.wav"):
        storage.create(join(folder, name), b"")
    assert uris(storage, join(folder, pattern)) == [join(folder, name) for name in expected]


def test_a_name_that_exists_wins_over_the_glob_it_looks_like(folder: str) -> None:
    storage = Storage()
    for name in ("a[1].wav", "a1.wav", "show [2019]/x.wav", "show 2/x.wav"):
        storage.create(join(folder, name), b"")
    assert uris(storage, join(folder, "a[1].wav")) == [join(folder, "a[1].wav")]
    assert uris(storage, join(folder, "show [2019]")) == [join(folder, "show [2019]/x.wav")]
    assert uris(storage, join(folder, "show [2019]/*.wav")) == [join(folder, "show [2019]/x.wav")]
    storage.delete(join(folder, "a[1].wav"))
    assert uris(storage, join(folder, "a[1].wav")) == [join(folder, "a1.wav")]


def test_a_glob_that_means_nothing_is_the_users_mistake(folder: str) -> None:
    Storage().create(join(folder, "a"), b"")
    with pytest.raises(ConfigError, match=r"\*\*"):
        uris(Storage(), join(folder, "x**y"))


def test_an_empty_folder_is_a_folder_without_files(tmp_path: Path) -> None:
    assert Storage().is_folder(str(tmp_path))
    assert uris(Storage(), str(tmp_path)) == []


def test_a_dangling_link_is_listed_and_a_pipe_is_not(tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    (entry,) = Storage().list_files(str(tmp_path))
    assert entry.uri == f"{tmp_path}/link.wav"
    assert entry.size_bytes is None
    assert Storage().stat(f"{tmp_path}/pipe.wav") is None


# --- what a user sees


def test_check_writable_leaves_nothing(folder: str) -> None:
    Storage().check_writable(folder)
    assert not Storage().is_folder(folder)


def test_check_writable_keeps_what_was_there(folder: str) -> None:
    Storage().create(join(folder, "a"), b"")
    Storage().check_writable(folder)
    assert uris(Storage(), folder) == [join(folder, "a")]


@pytest.mark.parametrize("below", ["", "/out", "/deep/out"])
def test_a_folder_cannot_be_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write to .*file\.txt.* choose another place"):
        Storage().check_writable(f"{tmp_path}/file.txt{below}")
    with pytest.raises(OSError, match=r"file\.txt"):
        Storage().create(f"{tmp_path}/file.txt{below}/part", b"")


def test_a_memory_file_cannot_be_below_a_file() -> None:
    base = f"memory://{uuid.uuid4().hex}"
    Storage().create(base, b"")
    with pytest.raises(OSError, match="in its way"):
        Storage().create(join(base, "a"), b"")


def test_a_folder_the_kernel_refuses() -> None:
    with pytest.raises(ConfigError, match="cannot write to /proc/kikitori/out"):
        Storage().check_writable("/proc/kikitori/out")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ConfigError, match="carrierpigeon"):
        Storage().stat("carrierpigeon://loft/a.wav")


def test_options_are_not_shown_and_survive_pickling() -> None:
    storage = Storage({"key": "AKIAEXAMPLE", "client_kwargs": {"token": "sesame"}})
    assert "AKIAEXAMPLE" not in repr(storage)
    assert pickle.loads(pickle.dumps(storage)) == storage


# --- faults of the network


class FaultyFileSystem(MemoryFileSystem):
    """Memory, reached through a network that fails; the errors to come are taken from the list, one per call."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own way of sharing)
    pseudo_dirs = [""]  # noqa: RUF012
    faults: list[Exception] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("faulty://").strip("/")

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fail()
        return super().info(path, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._fail()
        return super().cat_file(path, start=start, end=end, **kwargs)


class AnswerError(Exception):
    """As botocore's errors do, it carries what the server answered."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


def answered(status: int, code: str = "") -> OSError:
    """What s3fs makes of it."""
    error = OSError(5, f"server answered {status}")
    error.__cause__ = AnswerError(status, code)
    return error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)  # only time is faked
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    Storage().overwrite("faulty://a", b"0123456789" * 100_000)
    FaultyFileSystem.faults = []
    return FaultyFileSystem.faults


TRANSIENT = [answered(503, "SlowDown"), answered(400, "BadDigest"), ConnectionResetError("reset"), TimeoutError()]


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_a_fault_that_passes_is_not_seen(faults: list[Exception], fault: Exception) -> None:
    faults += [fault] * 5
    assert len(Storage().read_bytes("faulty://a")) == 1_000_000
    assert faults == []


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_a_fault_that_stays_is_an_os_error_after_six_attempts(faults: list[Exception], fault: Exception) -> None:
    faults += [fault] * 7
    with pytest.raises(OSError, match="faulty://a: "):
        Storage().read_bytes("faulty://a")
    assert len(faults) == 1


@pytest.mark.parametrize(
    ("fault", "kind"), [(PermissionError("no"), PermissionError), (FileNotFoundError("gone"), FileNotFoundError)]
)
def test_what_cannot_pass_is_not_tried_again(faults: list[Exception], fault: OSError, kind: type[OSError]) -> None:
    faults += [fault] * 2
    with pytest.raises(kind, match="faulty://a: "):
        Storage().read_bytes("faulty://a")
    assert len(faults) == 1


def test_an_open_file_outlives_a_broken_connection(faults: list[Exception]) -> None:
    with Storage().open("faulty://a") as file:
        head = file.read(10)
        faults += [ConnectionResetError()] * 3
        file.seek(500_000)
        assert head + file.read(10) + file.read() == b"0123456789" * (2 + 49_999)
    assert faults == []


def test_a_secret_in_an_error_is_hidden(faults: list[Exception]) -> None:
    faults.append(PermissionError("sesame is wrong"))
    with pytest.raises(PermissionError) as caught:
        Storage({"secret": "sesame"}).read_bytes("faulty://a")
    assert str(caught.value) == "faulty://a: *** is wrong"
