import wave
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.discover import Found, discover
from pipeline.estimate import estimate_seconds
from pipeline.messages import Source
from pipeline.storage import Storage
from tests.containers import audio_table, put_lines, put_parquet, put_tar
from tests.make_audio import sine, wav

RATE_HZ = 8000


def make_input(number: int, *, suffix: str = ".wav", size_bytes: int | None = 1000) -> Found:
    source = Source(id=f"{number:032x}", uri=f"memory://nothing/{number}{suffix}", size_bytes=size_bytes)
    return Found(source=source, version="")


def put_wav(path: Path, *, seconds: float) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(b"\0\0" * round(seconds * RATE_HZ))


def estimated(*uris: Path) -> dict[str, float]:
    """By what follows the last `#`, or else the name."""
    found = discover([str(uri) for uri in uris], Storage()).found
    names = [one.source.uri.rpartition("#")[2].rpartition("/")[2] for one in found]
    return dict(zip(names, estimate_seconds(found, Storage()), strict=True))


def test_few_inputs_are_estimated_from_their_headers(tmp_path: Path) -> None:
    put_wav(tmp_path / "a.wav", seconds=1.5)
    put_wav(tmp_path / "b.wav", seconds=0.5)
    assert estimated(tmp_path) == {"a.wav": 1.5, "b.wav": 0.5}


def test_an_input_that_does_not_tell_is_taken_as_the_others_of_its_kind(tmp_path: Path) -> None:
    put_wav(tmp_path / "a.wav", seconds=2.0)
    size_bytes = (tmp_path / "a.wav").stat().st_size
    (tmp_path / "b.wav").write_bytes(b"\0" * 10)
    sources = [
        Source(id="a", uri=f"{tmp_path}/a.wav", size_bytes=size_bytes),
        Source(id="b", uri=f"{tmp_path}/b.wav", size_bytes=size_bytes * 3),
        Source(id="c", uri=f"{tmp_path}/c.flac", size_bytes=160_000),
        Source(id="d", uri=f"{tmp_path}/d.wav"),
    ]
    inputs = [Found(source=source, version="") for source in sources]
    assert estimate_seconds(inputs, Storage()) == pytest.approx([2.0, 6.0, 10.0, 0.0])


def test_of_many_inputs_a_fixed_sample_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def probe(storage: Storage, sources: Sequence[Source]) -> list[float | None]:
        opened.extend(source.uri for source in sources)
        return [10.0 if source.uri.endswith(".wav") else None for source in sources]

    monkeypatch.setattr("pipeline.estimate.probe_seconds", probe)
    inputs = [make_input(number) for number in range(600)]
    inputs += [make_input(number, suffix=".mp3", size_bytes=32_000) for number in range(600, 700)]
    seconds = estimate_seconds(inputs, Storage())
    assert len(opened) == 128
    assert (set(seconds[:600]), set(seconds[600:])) == ({10.0}, {2.0})
    sample, opened[:] = set(opened), []
    assert estimate_seconds(inputs[::-1], Storage()) == seconds[::-1]
    assert set(opened) == sample


def test_of_many_inputs_without_a_size_a_sample_gives_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.estimate.probe_seconds", lambda storage, sources: [7.0 for _ in sources])
    inputs = [make_input(number, size_bytes=None) for number in range(2000)]
    assert set(estimate_seconds(inputs, Storage())) == {7.0}


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0])
def test_a_header_that_lies_does_not_spoil_the_plan(monkeypatch: pytest.MonkeyPatch, nonsense: float) -> None:
    monkeypatch.setattr("pipeline.estimate.probe_seconds", lambda storage, sources: [nonsense for _ in sources])
    assert estimate_seconds([make_input(1, size_bytes=32_000)], Storage()) == [2.0]


def test_what_a_manifest_says_is_believed_and_not_looked_up(tmp_path: Path) -> None:
    manifest = put_lines(
        tmp_path / "m.jsonl",
        {"audio_filepath": "gone.wav", "duration": 12.5},
        {"audio_filepath": "gone.wav", "offset": 3, "duration": 2},
        "no json",
    )
    assert estimated(manifest) == {"gone.wav": 12.5, "t=3,5": 2.0, "3": 0.0}


def test_a_segment_without_a_duration_lasts_to_the_end(tmp_path: Path) -> None:
    put_wav(tmp_path / "a.wav", seconds=5.0)
    lines = [{"audio_filepath": "a.wav", "offset": 1.5}, {"audio_filepath": "a.wav", "offset": 9}]
    assert estimated(put_lines(tmp_path / "m.jsonl", *lines)) == {"t=1.5": 3.5, "t=9": 0.0}


def test_members_are_estimated_from_their_headers(tmp_path: Path) -> None:
    files = {f"{number}.wav": wav(sine(number / 4, rate_hz=RATE_HZ), rate_hz=RATE_HZ) for number in range(1, 4)}
    found = estimated(put_tar(tmp_path / "a.tar", files))
    assert found == pytest.approx({"1.wav": 0.25, "2.wav": 0.5, "3.wav": 0.75})


def test_rows_are_estimated_from_the_first_and_the_mean_of_their_group(tmp_path: Path) -> None:
    clip = wav(sine(1.0, rate_hz=RATE_HZ), rate_hz=RATE_HZ)
    found = estimated(put_parquet(tmp_path / "a.parquet", audio_table([(clip, None)] * 40), row_group_size=10))
    # Only the first rows are read; the others have their share of the bytes, which the file format adds a little to.
    assert [found[str(row)] for row in range(16)] == [1.0] * 16
    assert list(found.values()) == pytest.approx([1.0] * 40, rel=0.05)
