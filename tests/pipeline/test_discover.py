import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.discover import Discovery, discover, source_id
from pipeline.errors import ConfigError, SystemFailure
from pipeline.storage import FileEntry, Storage


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
    fill(tmp_path, "a.wav", "speech.txt", "_b", "live [1].wav")
    single = [str(tmp_path / name) for name in ("speech.txt", "_b", "live [1].wav")]
    discovery = discover([*single, str(tmp_path)], Storage())
    assert names_of(discovery, below=tmp_path) == ["_b", "a.wav", "live [1].wav", "speech.txt"]
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
    fill(tmp_path, "audio/a.wav", "data/part-0.parquet", "_kikitori/x.json", "_kikitori/manifest/plan-00000.parquet")
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
        ("sets", r"1 \.parquet, 1 \.tar.*unpack"),
        ("sets/a.parquet", "cannot be read yet"),
        ("sets/*.tar", "cannot be read yet"),
        ("manifest.jsonl", "cannot be read yet"),
        ("nul\0.wav", "no file name can hold"),
    ],
)
def test_what_holds_no_audio_is_refused_saying_what_was_found(tmp_path: Path, uri: str, says: str) -> None:
    fill(tmp_path, "texts/a.txt", "texts/b.txt", "texts/c.json", "sets/a.parquet", "sets/b.tar")
    (tmp_path / "empty").mkdir()
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
