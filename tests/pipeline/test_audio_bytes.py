import hashlib
import os
import random
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio_bytes import AudioFiles
from pipeline.discover import discover
from pipeline.errors import InputError
from pipeline.messages import Segment, Source
from pipeline.storage import FileEntry, Storage
from tests.containers import audio_table, put_lines, put_parquet, put_tar, tar
from tests.s3 import S3Server

BLOBS = st.lists(st.binary(min_size=1, max_size=2000), min_size=1, max_size=8)


class _Counting(Storage):
    """Notes what is opened."""

    opened: list[str] = []  # noqa: RUF012 (a Storage is frozen, and each test clears it)

    def open(self, uri: str) -> BinaryIO:
        self.opened.append(uri)
        return super().open(uri)

    def download(self, uri: str, out: BinaryIO) -> None:
        self.opened.append(uri)
        super().download(uri, out)


def sources_in(*uris: object, storage: Storage | None = None) -> list[Source]:
    return [one.source for one in discover([str(uri) for uri in uris], storage or Storage()).found]


def read_all(sources: Iterable[Source], storage: Storage | None = None) -> list[bytes]:
    contents: list[bytes] = []
    with AudioFiles(storage or Storage()) as files:
        for source in sources:
            with files.fetched(source) as (file, digest):
                contents.append(file.read())
                assert digest == hashlib.sha256(contents[-1]).hexdigest()
                file.seek(-1, os.SEEK_END)
                assert file.read() == contents[-1][-1:]
    return contents


def fault_of(source: Source, storage: Storage | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        read_all([source], storage)
    return caught.value


def by_number(sources: Iterable[Source]) -> list[Source]:
    """In the order of the container, which is not that of the URIs (`#10` comes before `#9`)."""
    return sorted(sources, key=lambda source: int(source.uri.rpartition("#")[2].partition(".")[0]))


@given(blobs=BLOBS, order=st.randoms())
def test_a_member_has_the_bytes_it_was_written_with(blobs: list[bytes], order: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        put_tar(Path(folder) / "a.tar", {f"{number}.wav": blob for number, blob in enumerate(blobs)})
        pairs = list(zip(by_number(sources_in(f"{folder}/a.tar")), blobs, strict=True))
        order.shuffle(pairs)
        assert read_all(source for source, _ in pairs) == [blob for _, blob in pairs]


@given(blobs=BLOBS, order=st.randoms(), group_size=st.integers(1, 4))
def test_a_row_has_the_bytes_it_was_written_with(blobs: list[bytes], order: random.Random, group_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        put_parquet(path, audio_table([(blob, None) for blob in blobs]), row_group_size=group_size)
        pairs = list(zip(by_number(sources_in(path)), blobs, strict=True))
        order.shuffle(pairs)
        assert read_all(source for source, _ in pairs) == [blob for _, blob in pairs]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return Storage(server.options()), f"s3://{server.new_bucket()}/data"
    return Storage(), f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"{tmp_path}/data"


def test_a_remote_container_gives_what_a_local_one_gives(place: tuple[Storage, str], tmp_path: Path) -> None:
    storage, folder = place
    blobs = [bytes([number]) * 400_000 for number in range(5)]  # beyond what is read ahead
    storage.create(f"{folder}/a.tar", tar([(f"{number}.wav", blob) for number, blob in enumerate(blobs)]))
    table = put_parquet(tmp_path / "made.parquet", audio_table([(blob, None) for blob in blobs]))
    storage.create(f"{folder}/a.parquet", table.read_bytes())
    lines = put_lines(tmp_path / "made.jsonl", {"audio_filepath": "sets/b.wav"}, {"audio_filepath": "gone.wav"})
    storage.create(f"{folder}/m.jsonl", lines.read_bytes())
    storage.create(f"{folder}/sets/b.wav", b"beside")
    for name in ("a.tar", "a.parquet"):
        assert read_all(by_number(sources_in(f"{folder}/{name}", storage=storage)), storage) == blobs
    there, gone = sorted(sources_in(f"{folder}/m.jsonl", storage=storage), key=lambda source: "gone" in source.uri)
    assert read_all([there], storage) == [b"beside"]
    with pytest.raises(FileNotFoundError):
        read_all([gone], storage)
    assert len(sources_in(folder, storage=storage)) == 11


def test_a_row_without_bytes_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.wav").write_bytes(b"beside")
    (tmp_path / "b.wav").write_bytes(b"elsewhere")
    cells = [(None, "clips/a.wav"), (b"inside", "clips/a.wav"), (None, f"{tmp_path}/b.wav"), (None, "gone.wav")]
    path = put_parquet(tmp_path / "a.parquet", audio_table([*cells, (None, None), (b"", None)]))
    sources = by_number(sources_in(path))
    assert read_all(sources[:3]) == [b"beside", b"inside", b"elsewhere"]
    gone, neither = fault_of(sources[3]), fault_of(sources[4])
    assert (gone.code, neither.code) == ("NOT_FOUND", "BAD_CONTAINER")
    assert f"{tmp_path}/gone.wav" in gone.message
    assert "neither bytes nor a path in its column audio" in neither.message
    with AudioFiles(Storage()) as files, files.fetched(sources[5]) as (file, _):
        assert file.read() == b""


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_container_that_has_changed_gives_nothing(tmp_path: Path, name: str) -> None:
    # Another recording under the id of the one that was planned would be worse than none.
    def write(*blobs: bytes) -> None:
        put_tar(tmp_path / "a.tar", {f"{number}.wav": blob for number, blob in enumerate(blobs)})
        put_parquet(tmp_path / "a.parquet", audio_table([(blob, None) for blob in blobs]))

    write(b"one", b"two")
    planned = by_number(sources_in(tmp_path / name))
    write(b"two", b"one")
    os.utime(tmp_path / name, (1, 1))
    now = by_number(sources_in(tmp_path / name))
    assert not {source.id for source in planned} & {source.id for source in now}
    assert read_all(now) == [b"two", b"one"]
    for source in planned:
        assert fault_of(source).code == "NOT_FOUND"
        assert "has changed since it was planned" in fault_of(source).message
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        read_all(planned)


def test_a_store_without_versions_still_tells_a_row_that_is_not_there(tmp_path: Path) -> None:
    class Unversioned(Storage):
        def stat(self, uri: str) -> FileEntry | None:
            entry = super().stat(uri)
            return entry and FileEntry(uri=entry.uri, size_bytes=entry.size_bytes, version="")

    path = put_parquet(tmp_path / "a.parquet", audio_table([(b"x", None)] * 4))
    (*_, last) = by_number(sources_in(path, storage=Unversioned()))
    put_parquet(path, audio_table([(b"x", None)] * 3))
    assert fault_of(last, Unversioned()).code == "NOT_FOUND"
    put_parquet(path, audio_table([(b"x", None)] * 4, column="sound"))
    assert fault_of(last, Unversioned()).code == "NOT_FOUND"
    path.write_bytes(b"not parquet")
    assert fault_of(last, Unversioned()).code == "BAD_CONTAINER"


def test_a_file_is_opened_once_for_all_that_come_in_a_row(tmp_path: Path) -> None:
    blobs = {f"{number}.wav": bytes([number]) for number in range(5)}
    put_tar(tmp_path / "a.tar", blobs)
    put_parquet(tmp_path / "b.parquet", audio_table([(blob, None) for blob in blobs.values()]))
    (tmp_path / "c.wav").write_bytes(b"long recording")
    recording = f"{tmp_path}/c.wav"
    segments = [
        Source(id=str(at), uri="-", place=Segment(file_uri=recording, start_seconds=at, duration_seconds=1))
        for at in range(5)
    ]
    _Counting.opened.clear()
    sources = [*sources_in(tmp_path / "a.tar"), *sources_in(tmp_path / "b.parquet"), *segments]
    assert read_all(sources, _Counting())[-5:] == [b"long recording"] * 5
    assert _Counting.opened == [f"{tmp_path}/a.tar", f"{tmp_path}/b.parquet", recording]


def test_nothing_stays_open(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", {"0.wav": b"x", "1.wav": b"y"})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_all(sources_in(tmp_path / "a.tar"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_headers_are_peeked_at_without_reading_the_rest(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", {"0.wav": b"member"})
    put_parquet(tmp_path / "b.parquet", audio_table([(b"cell", None), (None, "c.wav")]))
    (tmp_path / "c.wav").write_bytes(b"file")
    sources = [*sources_in(tmp_path / "a.tar"), *sources_in(tmp_path / "b.parquet"), *sources_in(tmp_path / "c.wav")]
    with AudioFiles(Storage()) as files:
        contents: list[bytes] = []
        for source in sources:
            with files.peeked(source) as file:
                contents.append(file.read())
    assert contents == [b"member", b"cell", b"file", b"file"]
