import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.discover import Discovery, Search, discover, inner_id, source_id
from pipeline.errors import ConfigError, SystemFailure
from pipeline.messages import ParquetRow, Segment, Source, TarMember
from pipeline.storage import FileEntry, Storage
from tests.containers import audio_table, put_lines, put_parquet, put_tar, tar


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names_of(discovery: Discovery, *, below: Path) -> list[str]:
    return [os.path.relpath(one.source.uri, below) for one in discovery.found]


@given(size=st.none() | st.integers(0, 2**40), version=st.text(), other=st.text())
def test_an_id_follows_from_uri_size_and_version(size: int | None, version: str, other: str) -> None:
    id = source_id("s3://bucket/a.wav", size, version)
    assert len(id) == 32
    assert set(id) <= set("0123456789abcdef")
    assert id == source_id("s3://bucket/a.wav", size, version)
    assert id != source_id("s3://bucket/b.wav", size, version)
    assert id != source_id("s3://bucket/a.wav", (size or 0) + 1, version)
    assert (id == source_id("s3://bucket/a.wav", size, other)) == (version == other)


def test_the_spelling_of_a_path_does_not_change_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.wav")
    monkeypatch.chdir(tmp_path)
    spellings = ["a.wav", "./a.wav", str(tmp_path / "a.wav"), f"file://{tmp_path}/a.wav", ".", "*.wav"]
    found = [discover([spelling], Storage()).found for spelling in spellings]
    assert all(one == found[0] for one in found)


def test_folders_globs_and_files_reaching_the_same_file_are_one_input(tmp_path: Path) -> None:
    fill(tmp_path, "a.wav", "deep/er/b.mp3", "c.flac")
    uris = [str(tmp_path), f"{tmp_path}/*.wav", f"{tmp_path}/c.flac", f"{tmp_path}/"]
    discovery = discover(uris, Storage())
    assert names_of(discovery, below=tmp_path) == ["a.wav", "c.flac", "deep/er/b.mp3"]
    assert discovery == discover(uris[::-1], Storage())


def test_what_is_plainly_not_audio_is_counted_and_the_rest_is_tried(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "a.WAV",
        "b.txt",
        "c.TXT",
        "d.json",
        "_SUCCESS",
        "no_extension",
        "e.unheard-of",
        "f.mp4",
        ".hidden.wav",
    )
    discovery = discover([str(tmp_path)], Storage())
    assert names_of(discovery, below=tmp_path) == ["a.WAV", "e.unheard-of", "f.mp4", "no_extension"]
    assert dict(discovery.ignored) == {".txt": 2, ".json": 1, "_*": 1}


def test_a_file_named_by_itself_is_always_an_input(tmp_path: Path) -> None:
    fill(tmp_path, "a.wav", "speech.csv", "_b", "live [1].wav")
    single = [str(tmp_path / name) for name in ("speech.csv", "_b", "live [1].wav")]
    discovery = discover([*single, str(tmp_path)], Storage())
    assert names_of(discovery, below=tmp_path) == ["_b", "a.wav", "live [1].wav", "speech.csv"]
    assert dict(discovery.ignored) == {}


def test_a_missing_file_is_an_input_whose_size_is_not_known(tmp_path: Path) -> None:
    (missing,) = discover([f"{tmp_path}/not/there.mp3"], Storage()).found
    assert (missing.source.uri, missing.source.size_bytes) == (f"{tmp_path}/not/there.mp3", None)
    fill(tmp_path, "not/there.mp3")
    (present,) = discover([f"{tmp_path}/not/there.mp3"], Storage()).found
    assert present.source.id != missing.source.id


def test_a_changed_file_is_another_input(tmp_path: Path) -> None:
    fill(tmp_path, "a.wav", "b.wav")
    before = discover([str(tmp_path)], Storage()).found
    os.utime(tmp_path / "a.wav", (1_000_000_000, 1_000_000_000))
    after = discover([str(tmp_path)], Storage()).found
    assert before[0].source.id != after[0].source.id
    assert before[1] == after[1]


@pytest.mark.parametrize("listed", ["", "*.*", "**", "**/*.wav"])
def test_the_output_inside_an_input_folder_is_not_input(tmp_path: Path, listed: str) -> None:
    fill(tmp_path, "a.wav", "out/data/part-0.parquet", "out/_kikitori/x.json", "out/kept.wav", "outer/b.wav")
    discovery = discover([f"{tmp_path}/{listed}"], Storage(), output_uri=f"{tmp_path}/out/")
    assert "out/kept.wav" not in names_of(discovery, below=tmp_path)
    assert names_of(discovery, below=tmp_path)[0] == "a.wav"
    assert dict(discovery.ignored) == {}


@pytest.mark.parametrize("below", ["", "audio"])
def test_audio_inside_the_output_folder_is_input_and_our_files_are_not(tmp_path: Path, below: str) -> None:
    fill(tmp_path, "audio/a.wav", "data/part-0.parquet", "_kikitori/x.json", "_kikitori/manifest/plan-00000.manifest")
    discovery = discover([str(tmp_path / below)], Storage(), output_uri=str(tmp_path))
    assert names_of(discovery, below=tmp_path) == ["audio/a.wav"]
    assert dict(discovery.ignored) == {}


def test_file_names_that_are_not_utf8_are_inputs(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    with open(path, "wb") as file:
        file.write(b"x")
    (one,) = discover([str(tmp_path)], Storage()).found
    assert os.fsencode(one.source.uri) == path
    assert len(one.source.id) == 32


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("missing", "no folder or file .*missing"),
        ("missing/", "no folder or file .*missing"),
        ("empty", "empty holds no file"),
        ("texts", r"no audio in .*texts; found 3 files .*2 \.txt, 1 \.json.*name the folder"),
        ("*.mp3", r"\*\.mp3 matches no file"),
        ("texts/*", r"no audio in .*2 \.txt"),
        ("sets", r"no audio in .*1 \.parquet, 1 \.tar"),
        ("sets/texts.parquet", "has no audio column, but id, text; expected one marked as Audio"),
        ("sets/*.parquet", "has no audio column, but id, text"),
        ("sets/texts.tar", "no audio in .*texts.tar"),
        ("sets/*.tar", r"no audio in .*1 \.tar"),
        ("manifest.jsonl", "no folder or file .*manifest.jsonl"),
        ("gone.tar", "no folder or file .*gone.tar"),
        ("texts/c.json", "c.json is no manifest: line 1 is not JSON"),
        ("empty.jsonl", "no audio in .*empty.jsonl"),
        ("texts/*.json", "c.json is no manifest"),
        ("a.tar.gz", "is compressed.*store it uncompressed"),
        ("x/*.jsonl.gz", "is compressed"),
        ("named", r"no audio in .*1 \.jsonl.*or the manifest itself"),
        ("nul\0.wav", "no file name can hold"),
    ],
)
def test_what_holds_no_audio_is_refused_saying_what_was_found(tmp_path: Path, uri: str, says: str) -> None:
    fill(tmp_path, "texts/a.txt", "texts/b.txt", "texts/c.json", "a.tar.gz", "named/a.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    put_tar(tmp_path / "sets/texts.tar", {"a.txt": b"text"})
    put_parquet(tmp_path / "sets/texts.parquet", pa.table({"id": [1], "text": ["a"]}))
    with pytest.raises(ConfigError, match=says):
        discover([f"{tmp_path}/{uri}"], Storage())


def test_no_uris_at_all_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"input\.uris is empty"):
        discover([], Storage())


@pytest.mark.parametrize(("fault", "raised"), [(PermissionError, ConfigError), (TimeoutError, SystemFailure)])
def test_a_storage_that_refuses_is_not_an_empty_one(fault: type[OSError], raised: type[Exception]) -> None:
    class Refusing(Storage):
        def stat(self, uri: str) -> FileEntry | None:
            raise fault(f"{uri}: refused")

    with pytest.raises(raised, match="s3://bucket/audio: refused"):
        discover(["s3://bucket/audio"], Refusing())


# --- containers


def sources_in(*uris: object, output: object = "") -> list[Source]:
    return [one.source for one in discover([str(uri) for uri in uris], Storage(), output_uri=str(output)).found]


def shown(sources: list[Source], *, below: Path) -> list[str]:
    return [os.path.relpath(source.uri, below) for source in sources]


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1, max_size=3))
def test_the_id_of_what_is_inside_is_never_that_of_another(parts: list[str]) -> None:
    ids = {
        inner_id("row", *parts),
        inner_id("member", *parts),
        inner_id("row", *parts, ""),
        inner_id("row", "".join(parts) + "x"),
        source_id(parts[0], None, ""),
    }
    assert len(ids) == 5
    assert inner_id("row", *parts) in ids


def test_the_audio_of_a_tar_is_its_inputs(tmp_path: Path) -> None:
    files = ["b/0001.flac", "b/0001.txt", "b/0001.json", "0002.wav", "0002.cls", "._0002.wav", "c#d.mp3"]
    path = put_tar(tmp_path / "a.tar", {name: name.encode() for name in files})
    sources = sources_in(path)
    assert shown(sources, below=tmp_path) == ["a.tar#0002.wav", "a.tar#b/0001.flac", "a.tar#c#d.mp3"]
    for source in sources:
        place = source.place
        assert isinstance(place, TarMember)
        data = path.read_bytes()[place.offset_bytes :][: source.size_bytes]
        assert data.decode() == place.name == source.uri.partition("#")[2]
    assert sources == sources_in(path)


def test_no_recording_of_a_tar_is_dropped(tmp_path: Path) -> None:
    """Two microphones of one sample, a name that is there twice, a field of an unknown kind where there is no other."""
    names = ["1.left.wav", "1.right.wav", "1.speaker", "2.wav", "2.wav", "3.voice"]
    (tmp_path / "a.tar").write_bytes(tar([(name, bytes([index])) for index, name in enumerate(names)]))
    sources = sources_in(tmp_path / "a.tar")
    assert [source.uri.partition("#")[2] for source in sources] == [
        "1.left.wav", "1.right.wav", "2.wav", "2.wav", "3.voice",
    ]  # fmt: skip
    assert len({source.id for source in sources}) == 5


def test_the_rows_of_a_parquet_file_are_its_inputs(tmp_path: Path) -> None:
    path = put_parquet(tmp_path / "a.parquet", audio_table([(b"x", None)] * 12, column="speech"), row_group_size=5)
    sources = sources_in(path)
    assert sorted(shown(sources, below=tmp_path)) == sorted(f"a.parquet#{row}" for row in range(12))
    places = {source.place for source in sources}
    version = str(path.stat().st_mtime_ns)
    assert places == {
        ParquetRow(file_uri=str(path), file_version=version, column="speech", row=row) for row in range(12)
    }


def test_the_lines_of_a_manifest_are_its_inputs(tmp_path: Path) -> None:
    path = put_lines(
        tmp_path / "sets/m.jsonl",
        {"audio_filepath": "a.wav", "duration": 9.5},
        {"audio_filepath": "a.wav", "offset": 12.34, "duration": 3.3},
        {"audio_filepath": "../b.wav", "offset": 2},
        {"audio_filepath": "s3://bucket/c.wav", "offset": 0, "duration": 0.5},
    )
    found = discover([str(path)], Storage()).found
    assert [(one.source.uri, one.declared_seconds) for one in found] == [
        (f"{tmp_path}/b.wav#t=2", None),
        (f"{tmp_path}/sets/a.wav", 9.5),
        (f"{tmp_path}/sets/a.wav#t=12.34,15.64", 3.3),
        ("s3://bucket/c.wav#t=0,0.5", 0.5),
    ]
    recording = f"{tmp_path}/sets/a.wav"
    assert found[1].source.place is None
    assert found[2].source.place == Segment(file_uri=recording, start_seconds=12.34, duration_seconds=3.3)


def test_lines_that_are_added_to_a_manifest_leave_the_others_as_they_were(tmp_path: Path) -> None:
    lines = [{"audio_filepath": f"{index}.wav", "offset": index, "duration": 1} for index in range(5)]
    before = sources_in(put_lines(tmp_path / "m.jsonl", *lines[1:4], "spoilt"))
    after = sources_in(put_lines(tmp_path / "m.jsonl", *lines, "spoilt", "spoilt as well"))
    assert {source.id for source in before} < {source.id for source in after}
    assert len(after) == 7


def test_a_line_of_a_list_is_a_file_or_what_it_holds(tmp_path: Path) -> None:
    put_tar(tmp_path / "sets/a.tar", {"1.wav": b"x"})
    path = put_lines(tmp_path / "all.lst", "# these", "b.wav", "sets/a.tar", "s3://bucket/c.mp3", "sets/gone.tar")
    sources = sources_in(path)
    assert [source.uri for source in sources] == [
        f"{tmp_path}/b.wav",
        f"{tmp_path}/sets/a.tar#1.wav",
        f"{tmp_path}/sets/gone.tar",
        "s3://bucket/c.mp3",
    ]
    assert [source.fault is None for source in sources] == [True, True, False, True]
    assert sources_in(put_lines(tmp_path / "all.txt", "b.wav"))[0] == sources[0]


def put_everything(folder: Path) -> None:
    """A folder as people have them: audio, sets of audio, what names it, and what is none of that."""
    put_tar(folder / "sets/a.tar", {"1.wav": b"x", "1.txt": b"text"})
    put_parquet(folder / "sets/b.parquet", audio_table([(b"x", None)]))
    put_parquet(folder / "metadata.parquet", pa.table({"path": ["c.wav"], "text": ["hello"]}))
    put_parquet(folder / "paths.parquet", audio_table([(None, "c.wav")]))
    put_lines(folder / "manifest.jsonl", {"audio_filepath": "c.wav"})
    put_lines(folder / "files.txt", "c.wav")
    put_tar(folder / "sources.tar", {"main.py": b"code"})
    fill(folder, "c.wav", "_hidden.tar")


def test_a_folder_gives_what_holds_audio_and_not_what_only_names_it(tmp_path: Path) -> None:
    put_everything(tmp_path)
    for uri in (str(tmp_path), f"{tmp_path}/**"):
        discovery = discover([uri], Storage())
        assert names_of(discovery, below=tmp_path) == ["c.wav", "sets/a.tar#1.wav", "sets/b.parquet#0"]
        assert dict(discovery.ignored) == {".parquet": 2, ".jsonl": 1, ".txt": 1, ".tar": 1, "_*": 1}


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("*.jsonl", ["c.wav"]),
        ("*.txt", ["c.wav"]),
        ("files.txt", ["c.wav"]),
        ("metadata.parquet", ["metadata.parquet#0"]),
        ("paths.parquet", ["paths.parquet#0"]),
        ("sets/*.tar", ["sets/a.tar#1.wav"]),
        ("sets/*", ["sets/a.tar#1.wav", "sets/b.parquet#0"]),
        ("s*/[ab].*", ["sets/a.tar#1.wav", "sets/b.parquet#0"]),
    ],
)
def test_a_container_that_is_named_is_opened(tmp_path: Path, uri: str, names: list[str]) -> None:
    put_everything(tmp_path)
    assert shown(sources_in(tmp_path / uri), below=tmp_path) == names


def test_containers_in_the_output_are_not_inputs(tmp_path: Path) -> None:
    put_everything(tmp_path / "in")
    put_parquet(tmp_path / "in/out/data/part-0.parquet", audio_table([(b"x", None)]))
    inside = sources_in(tmp_path / "in", output=tmp_path / "in/out")
    assert shown(inside, below=tmp_path / "in") == ["c.wav", "sets/a.tar#1.wav", "sets/b.parquet#0"]


def test_what_is_damaged_is_an_input_beside_what_could_be_read(tmp_path: Path) -> None:
    whole = tar([(f"{index}.wav", bytes(600)) for index in range(3)])
    (tmp_path / "a.tar").write_bytes(whole[: 2 * 1536 + 700])  # in the third
    (tmp_path / "b.tar").write_bytes(b"no tar")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    (tmp_path / "d.tar").symlink_to(tmp_path / "nowhere")
    put_tar(tmp_path / "e.tar", {"1.wav": b"x"})
    faults = {os.path.relpath(source.uri, tmp_path): source.fault for source in sources_in(tmp_path)}
    assert {"a.tar#0.wav", "a.tar#1.wav", "e.tar#1.wav"} <= {name for name, fault in faults.items() if fault is None}
    broken = {name: fault for name, fault in faults.items() if fault is not None}
    assert set(broken) == {"a.tar", "b.tar", "c.parquet", "d.tar"}
    assert "damaged after" in str(broken["a.tar"])
    assert "not an uncompressed tar" in str(broken["b.tar"])
    assert "no Parquet file" in str(broken["c.parquet"])
    assert "does not exist" in str(broken["d.tar"])


def test_a_link_in_a_tar_is_an_input_that_says_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as writer:
        link = tarfile.TarInfo("b.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "a.wav"
        writer.addfile(link)
    (source,) = sources_in(tmp_path / "a.tar")
    assert source.uri == f"{tmp_path}/a.tar#b.wav"
    assert "link to a.wav" in str(source.fault)


# --- searching lazily


def test_nothing_is_listed_before_it_is_needed(tmp_path: Path) -> None:
    listed: list[str] = []

    class Listing(Storage):
        def list_files(self, uri: str) -> Iterator[FileEntry]:
            for entry in super().list_files(uri):
                listed.append(entry.uri)
                yield entry

    fill(tmp_path, *(f"{index}.wav" for index in range(5)))
    search = Search([str(tmp_path)], Listing())
    assert listed == []
    found = iter(search)
    next(found)
    next(found)
    assert len(listed) == 2
    assert [one.source.uri for one in search] == [f"{tmp_path}/{index}.wav" for index in range(5)]


def test_a_search_holds_no_more_for_a_longer_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.input_lists._BLOCK_BYTES", 100_000)

    def peak_bytes(num_lines: int) -> int:
        line = '{"audio_filepath": "folder/of/some/length/%d.wav", "offset": 1.5, "duration": 2.5}\n'
        path = tmp_path / "m.jsonl"
        path.write_text("".join(line % index for index in range(num_lines)))
        tracemalloc.start()
        assert sum(1 for _ in Search([str(path)], Storage())) == num_lines
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(1000)
    assert peak_bytes(20_000) < 1.2 * peak_bytes(5_000)


def test_a_mistake_in_the_last_uri_is_told_before_the_first_is_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.wav")
    with pytest.raises(ConfigError, match=r"no folder or file .*missing"):
        Search([str(tmp_path), f"{tmp_path}/missing"], Storage())
