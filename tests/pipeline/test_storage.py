import os
import pickle
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import retries
from pipeline.errors import ConfigError
from pipeline.listing import FileEntry, Pattern
from pipeline.storage import Storage, has_glob, is_local, join, normalise
from tests.s3 import S3Server

IN_A_PLACE = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder that does not exist yet, and how to reach it."""

    storage: Storage
    folder: str

    def fill(self, *names: str) -> None:
        for name in names:
            assert self.storage.create(join(self.folder, name), name.encode())

    def uris(self, pattern: str = "") -> list[str]:
        return [entry.uri for entry in self.storage.list_files(join(self.folder, pattern) if pattern else self.folder)]

    def below(self) -> "Place":
        return Place(storage=self.storage, folder=join(self.folder, uuid.uuid4().hex))


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """One on every kind of storage: what holds here holds everywhere."""
    if request.param == "local":
        yield Place(storage=Storage(), folder=f"{tmp_path}/data")
    elif request.param == "file":
        yield Place(storage=Storage(), folder=f"file://{tmp_path}/data")
    elif request.param == "memory":
        yield Place(storage=Storage(), folder=f"memory://{uuid.uuid4().hex}")
        fsspec.filesystem("memory").store.clear()
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        yield Place(storage=Storage(server.options()), folder=f"s3://{server.new_bucket()}/data")


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


@IN_A_PLACE
@given(data=st.binary(max_size=200))
def test_what_is_created_is_what_is_read(place: Place, data: bytes) -> None:
    storage, uri = place.storage, join(place.below().folder, "a/b")
    assert storage.create(uri, data)
    assert storage.read_bytes(uri) == data
    with storage.open(uri) as file:
        assert file.read() == data
    copy = BytesIO(b"kept, replaced")
    copy.seek(6)
    storage.download(uri, copy)
    assert copy.getvalue() == b"kept, " + data
    entry = storage.stat(uri)
    assert entry is not None
    assert entry.size_bytes == len(data)


ACTIONS = st.sampled_from(["create", "overwrite", "delete"])


@IN_A_PLACE
@given(actions=st.lists(st.tuples(ACTIONS, st.sampled_from(["a", "d/b", "d/c"]), st.binary(max_size=20)), max_size=12))
def test_any_sequence_of_writes_leaves_what_a_dict_would_hold(
    place: Place, actions: Sequence[tuple[str, str, bytes]]
) -> None:
    here, expected = place.below(), dict[str, bytes]()
    for action, name, data in actions:
        uri = join(here.folder, name)
        if action == "create":
            assert here.storage.create(uri, data) == (name not in expected)
            expected.setdefault(name, data)
        elif action == "overwrite":
            here.storage.overwrite(uri, data)
            expected[name] = data
        else:
            here.storage.delete(uri)
            expected.pop(name, None)
    for name in ("a", "d/b", "d/c"):
        uri = join(here.folder, name)
        assert here.storage.exists(uri) == (name in expected)
        assert name not in expected or here.storage.read_bytes(uri) == expected[name]
    if expected:
        assert here.uris() == [join(here.folder, name) for name in sorted(expected)]


def test_create_never_replaces(place: Place) -> None:
    uri = join(place.folder, "a")
    assert place.storage.create(uri, b"first")
    assert not place.storage.create(uri, b"second")
    assert not place.storage.create(uri, b"first")
    assert place.storage.read_bytes(uri) == b"first"


def test_overwrite_replaces_and_delete_removes(place: Place) -> None:
    storage, uri = place.storage, join(place.folder, "a")
    storage.overwrite(uri, b"first")
    first = storage.stat(uri)
    storage.overwrite(uri, b"second, longer")
    assert storage.read_bytes(uri) == b"second, longer"
    assert storage.stat(uri) != first
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(uri)


def test_of_many_writers_exactly_one_creates(place: Place) -> None:
    uri = join(place.folder, "race")
    contents = [bytes([number]) * 100_000 for number in range(16)]
    start = threading.Barrier(16)

    def write(number: int) -> bool:
        start.wait()
        return place.storage.create(uri, contents[number])

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(write, range(16)))
    assert sum(results) == 1
    assert place.storage.read_bytes(uri) == contents[results.index(True)]
    assert place.uris() == [normalise(uri)]


CREATE_MANY = """
import pickle, sys
from pipeline.storage import Storage
storage, folder = pickle.loads(bytes.fromhex(sys.argv[1]))
print(sum(storage.create(f"{folder}/{number}", sys.argv[2].encode()) for number in range(6)))
"""


def test_of_many_processes_exactly_one_creates(place: Place) -> None:
    if place.folder.startswith("memory://"):
        pytest.skip("a memory is one process's")
    told = pickle.dumps((place.storage, place.folder)).hex()
    command = [sys.executable, "-c", CREATE_MANY, told]
    writers = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE) for number in range(3)]
    created = [int(writer.communicate(timeout=60)[0]) for writer in writers]
    assert sum(created) == 6
    contents = [place.storage.read_bytes(uri) for uri in place.uris()]
    assert [contents.count(str(number).encode()) for number in range(3)] == created


def test_readers_of_one_file_do_not_share_a_position(place: Place) -> None:
    uri = join(place.folder, "a")
    place.storage.create(uri, b"0123456789")
    with place.storage.open(uri) as one, place.storage.open(uri) as other:
        assert one.read(4) == b"0123"
        assert other.read(2) == b"01"
        assert one.seek(-1, os.SEEK_END) == 9
        assert one.read() == b"9"


@IN_A_PLACE
@given(reads=st.lists(st.tuples(st.integers(0, 1_100_000), st.integers(-1, 600_000)), max_size=6))
def test_any_reads_of_an_open_file_are_those_of_its_bytes(place: Place, reads: Sequence[tuple[int, int]]) -> None:
    uri, data = join(place.folder, "noise"), random.Random(0).randbytes(1_000_000)
    place.storage.create(uri, data)
    with place.storage.open(uri) as file:
        for start, length in reads:
            file.seek(start)
            assert file.read(length) == data[start : None if length < 0 else start + length]


def test_a_missing_file(place: Place) -> None:
    storage, uri = place.storage, join(place.folder, "missing.wav")
    assert storage.stat(uri) is None
    assert not storage.exists(uri)
    assert not storage.is_folder(uri)
    copy = BytesIO()
    for ask in (storage.open, storage.read_bytes, lambda uri: storage.download(uri, copy), place.storage.list_files):
        with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
            list(ask(uri) or [])  # type: ignore[call-overload]
    with pytest.raises(FileNotFoundError):
        place.uris()


def test_a_name_that_is_too_long_is_missing_and_cannot_be_written(place: Place) -> None:
    name = "x" * 2000
    assert place.storage.stat(join(place.folder, name)) is None
    if not place.folder.startswith("memory://"):
        with pytest.raises(OSError, match=r"too long|longer than"):
            place.storage.create(join(place.folder, name), b"")
        with pytest.raises(OSError, match=r"too long|longer than"):
            place.storage.overwrite(join(place.folder, name), b"")


# --- listing

PARTS = ["a", "a b", "a-b", "a!", "a.wav", "ab", "b", "Z", "é", "ａ", "😀.wav", ".h", "%2F+&#?=", "'\"<"]
NAMES = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), unique=True, max_size=12)


def without_conflicts(names: Sequence[str]) -> list[str]:
    """A file cannot lie below a file."""
    return [name for name in names if not any(other.startswith(f"{name}/") for other in names)]


@IN_A_PLACE
@given(names=NAMES.map(without_conflicts), pattern=st.sampled_from(["**", "a*", "*/*", "**/a*", "a/**", "?", ".h/**"]))
def test_a_listing_has_every_file_once_in_the_order_of_uris(place: Place, names: list[str], pattern: str) -> None:
    here = place.below()
    here.fill(*names, "zzz")
    root = normalise(here.folder)
    visible = [f"{root}/{name}" for name in [*names, "zzz"] if not name.startswith(".") and "/." not in name]
    assert here.uris() == sorted(visible)
    wanted = [name for name in [*names, "zzz"] if Pattern(pattern).wants(name)]
    assert here.uris(pattern) == sorted(f"{root}/{name}" for name in wanted)


def test_a_folder_lists_recursively_sorted_without_hidden_files(place: Place) -> None:
    place.fill("b.wav", "a/z.wav", "a.wav", ".hidden.wav", ".cache/x.wav", "a/.y.wav")
    root = normalise(place.folder)
    assert place.uris() == [f"{root}/a.wav", f"{root}/a/z.wav", f"{root}/b.wav"]
    assert [entry.uri for entry in place.storage.list_files(place.folder + "/")] == place.uris()
    assert place.storage.is_folder(place.folder)
    assert place.storage.stat(place.folder) is None


def test_a_name_that_starts_the_same_is_not_below(place: Place) -> None:
    place.fill("show/a.wav", "shows/b.wav", "show.wav")
    assert place.uris("show") == [join(place.folder, "show/a.wav")]
    assert not place.storage.is_folder(join(place.folder, "sho"))


def test_an_entry_is_the_same_in_a_listing_and_alone(place: Place) -> None:
    uri = join(place.folder, "a.wav")
    place.storage.create(uri, b"123")
    (entry,) = place.storage.list_files(place.folder)
    assert entry == place.storage.stat(uri)
    assert list(place.storage.list_files(uri)) == [entry]
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
def test_globs(place: Place, pattern: str, expected: list[str]) -> None:
    place.fill("a.wav", "b.wav", "c.txt", ".h.wav", "d/c.wav", "d/e/f.wav")
    assert place.uris(pattern) == [join(place.folder, name) for name in expected]


def test_a_name_that_exists_wins_over_the_glob_it_looks_like(place: Place) -> None:
    place.fill("a[1].wav", "a1.wav", "show [2019]/x.wav", "show 2/x.wav")
    assert place.uris("a[1].wav") == [join(place.folder, "a[1].wav")]
    assert place.uris("show [2019]") == [join(place.folder, "show [2019]/x.wav")]
    assert place.uris("show [2019]/*.wav") == [join(place.folder, "show [2019]/x.wav")]
    place.storage.delete(join(place.folder, "a[1].wav"))
    assert place.uris("a[1].wav") == [join(place.folder, "a1.wav")]


def test_a_glob_that_means_nothing_is_the_users_mistake(place: Place) -> None:
    place.fill("a")
    with pytest.raises(ConfigError, match=r"\*\*"):
        place.uris("x**y")


def test_an_empty_folder_is_a_folder_without_files(tmp_path: Path) -> None:
    assert Storage().is_folder(str(tmp_path))
    assert list(Storage().list_files(str(tmp_path))) == []


def test_a_dangling_link_is_listed_and_a_pipe_is_not(tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    (entry,) = Storage().list_files(str(tmp_path))
    assert entry == FileEntry(uri=f"{tmp_path}/link.wav", size_bytes=None, version="")
    assert Storage().stat(f"{tmp_path}/pipe.wav") is None


# --- what a user sees


def test_a_probe_leaves_nothing(place: Place) -> None:
    assert place.storage.probe(place.folder) == place.storage
    assert not place.storage.is_folder(place.folder)


def test_a_probe_keeps_what_was_there(place: Place) -> None:
    place.fill("a")
    place.storage.probe(place.folder)
    assert place.uris() == [join(place.folder, "a")]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / f"data/.kikitori-{'0' * 32}.tmp").touch()
    assert Storage().remove_leftovers(str(tmp_path)) == 0
    assert Storage().remove_leftovers(f"file://{tmp_path}", older_than_seconds=-1) == 1
    assert os.listdir(tmp_path / "data") == []
    assert Storage().remove_leftovers("memory://nowhere") == 0


@pytest.mark.parametrize("below", ["", "/out", "/deep/out"])
def test_a_folder_cannot_be_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write to .*file\.txt.* choose another place"):
        Storage().probe(f"{tmp_path}/file.txt{below}")
    with pytest.raises(OSError, match=r"file\.txt"):
        Storage().create(f"{tmp_path}/file.txt{below}/part", b"")


def test_a_memory_file_cannot_be_below_a_file() -> None:
    base = f"memory://{uuid.uuid4().hex}"
    Storage().create(base, b"")
    with pytest.raises(OSError, match="in its way"):
        Storage().create(join(base, "a"), b"")


def test_a_folder_the_kernel_refuses() -> None:
    with pytest.raises(ConfigError, match="cannot write to /proc/kikitori/out"):
        Storage().probe("/proc/kikitori/out")


def test_a_store_that_loses_what_it_is_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **range: b"")
    with pytest.raises(ConfigError, match="cannot write to memory://x: a new file does not hold what was written"):
        Storage().probe("memory://x")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ConfigError, match="carrierpigeon"):
        Storage().stat("carrierpigeon://loft/a.wav")


def test_options_are_not_shown_and_survive_pickling() -> None:
    storage = Storage({"key": "AKIAEXAMPLE", "client_kwargs": {"token": "sesame"}}, conditional_puts=False)
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


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)  # only time is faked
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    Storage().overwrite("faulty://a", b"0123456789" * 100_000)
    FaultyFileSystem.faults = []
    return FaultyFileSystem.faults


def test_a_fault_that_passes_is_not_seen(faults: list[Exception]) -> None:
    faults += [ConnectionResetError("reset"), TimeoutError()] * 3
    assert len(Storage().read_bytes("faulty://a")) == 1_000_000
    assert faults == []


def test_a_fault_that_stays_is_an_os_error_after_seven_attempts(faults: list[Exception]) -> None:
    faults += [TimeoutError("no answer")] * 8
    with pytest.raises(TimeoutError, match="faulty://a: no answer; tried again in vain"):
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
    assert str(caught.value).startswith("faulty://a: *** is wrong; ")


# --- HTTP


@pytest.fixture
def website(tmp_path: Path) -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    servers: list[ThreadingHTTPServer] = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server, which ignores what range is asked for."""

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


class Refusing(Quiet):
    """A server that answers everything with what the path says."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.rpartition("/")[2].partition("?")[0]))

    do_HEAD = do_GET


def test_a_web_server_without_ranges_is_read_like_any_other(website: Any, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(700_000)
    (tmp_path / "a.wav").write_bytes(data)
    uri = website(partial(Quiet, directory=str(tmp_path))) + "/a.wav"
    assert Storage().read_bytes(uri) == data
    with Storage().open(uri) as file:
        file.seek(300_000)
        assert file.read(1000) == data[300_000:301_000]
        file.seek(5)
        assert file.read() == data[5:]
    copy = BytesIO()
    Storage().download(uri, copy)
    assert copy.getvalue() == data
    assert not Storage().exists(uri + "x")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, FileNotFoundError), (410, FileNotFoundError), (403, PermissionError), (401, PermissionError)],
)
def test_what_a_web_server_answers_is_not_tried_again(website: Any, status: int, kind: type[OSError]) -> None:
    uri = f"{website(Refusing)}/{status}"
    for ask in (Storage().open, Storage().read_bytes):
        with pytest.raises(kind, match=f"/{status}"):
            ask(uri)


@pytest.mark.parametrize("uri", ["/503", "/500?token=sesame"])
def test_a_web_server_that_fails_is_not_a_missing_file(website: Any, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_BACKOFF_SECONDS", (0.001, 0.001))
    with pytest.raises(OSError, match="tried again in vain") as caught:
        Storage().stat(website(Refusing) + uri)
    assert not isinstance(caught.value, FileNotFoundError)
    assert "sesame" not in str(caught.value)


def test_a_host_that_is_down_is_not_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec says so of every failure on HTTP, and inputs on a host that was down were NOT_FOUND."""
    monkeypatch.setattr(retries, "_BACKOFF_SECONDS", (0.001, 0.001))
    for host in ("127.0.0.1:9", "no-such-host.invalid"):
        for ask in (Storage().open, Storage().stat, Storage().read_bytes):
            with pytest.raises(OSError, match="tried again in vain") as caught:
                ask(f"http://user:sesame@{host}/a.wav")
            assert not isinstance(caught.value, FileNotFoundError)
            assert "sesame" not in str(caught.value)
