import hashlib
import inspect
import io
import shutil
import tracemalloc
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import pipeline.load
from pipeline.decode_audio import Pcm
from pipeline.discover import discover
from pipeline.load import TAIL_MARGIN_SECONDS, LoadStage, Padding, cut, probe_seconds
from pipeline.messages import Failure, Segment, Source, Waveform
from pipeline.storage import Storage
from tests.containers import audio_table, put_lines, put_parquet, put_tar
from tests.make_audio import encoded, sine, wav

PADDING = Padding(prefix_seconds=0.5, delay_seconds=0.25)
FRAME = PADDING.samples_per_frame


def load(
    data: bytes, folder: Path, *, padding: Padding = PADDING, piece_seconds: float = 60.0
) -> list[Waveform | Failure]:
    path = folder / "input.bin"
    path.write_bytes(data)
    return list(LoadStage(Storage(), padding, piece_seconds=piece_seconds).run([Source(id="x", uri=str(path))]))


def joined(messages: Iterable[Waveform | Failure]) -> NDArray[np.float32]:
    pieces = [message for message in messages if isinstance(message, Waveform)]
    return np.concatenate([piece.samples for piece in pieces])


def failure(messages: list[Waveform | Failure]) -> Failure:
    last = messages[-1]
    assert isinstance(last, Failure), last
    return last


def one_shot(samples: NDArray[np.float32], rate_hz: int, padding: Padding) -> NDArray[np.float32]:
    """What the pieces must add up to, written down the simple way."""
    if rate_hz != padding.sampling_rate_hz:
        samples = soxr.resample(samples, rate_hz, padding.sampling_rate_hz, quality="HQ")
    padded = np.concatenate(
        [np.zeros(padding.prefix_samples, np.float32), samples, np.zeros(padding.tail_samples, np.float32)]
    )
    padded = padded[: padding.num_frames(len(samples)) * padding.samples_per_frame]
    return np.concatenate([padded[:FRAME], padded]) if padding.repeat_first_frame else padded


# --- padding and pieces


def test_padding_is_what_both_references_add() -> None:
    padding = Padding(prefix_seconds=1.0, delay_seconds=2.5)
    assert padding.prefix_samples == 24_000
    assert padding.tail_samples == int((2.5 + TAIL_MARGIN_SECONDS) * 24_000) == 84_000
    assert padding.num_frames(0) == 108_000 // 1920 == 56
    assert padding.num_frames(1920 - 480) == 57
    assert padding.num_frames(1920 - 481) == 56  # a last partial frame is dropped


@given(
    lengths=st.lists(st.integers(0, 50), max_size=20),
    frames_per_piece=st.integers(1, 5),
    samples_per_frame=st.integers(1, 7),
)
def test_cutting_changes_no_sample(lengths: list[int], frames_per_piece: int, samples_per_frame: int) -> None:
    total = sum(lengths)
    everything = np.arange(total, dtype=np.float32)
    blocks = np.split(everything, np.cumsum(lengths)[:-1]) if lengths else []
    piece_samples = frames_per_piece * samples_per_frame
    pieces = list(cut(blocks, piece_samples=piece_samples, samples_per_frame=samples_per_frame))
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(samples) % samples_per_frame == 0 for samples, _ in pieces)
    assert all(0 < len(samples) <= piece_samples for samples, _ in pieces[:-1])
    assert len(pieces[-1][0]) < piece_samples + samples_per_frame
    assert len(pieces[-1][0]) > 0 or total < samples_per_frame
    whole = total // samples_per_frame * samples_per_frame
    np.testing.assert_array_equal(np.concatenate([samples for samples, _ in pieces]), everything[:whole])


@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 44_100])
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("prefix_seconds", [0.0, 0.5])
@pytest.mark.parametrize("piece_seconds", [0.01, 0.08, 0.5, 1.3, 60.0])
def test_pieces_add_up_to_the_padded_waveform(
    tmp_path: Path, rate_hz: int, repeat: bool, prefix_seconds: float, piece_seconds: float
) -> None:
    padding = Padding(prefix_seconds=prefix_seconds, delay_seconds=0.25, repeat_first_frame=repeat)
    noise = np.random.default_rng(0).integers(-9000, 9000, rate_hz * 2 + 123).astype(np.float32) / 32768
    messages = load(wav(noise, rate_hz=rate_hz), tmp_path, padding=padding, piece_seconds=piece_seconds)
    expected = one_shot(noise, rate_hz, padding)
    # soxr may work in other block sizes one-shot than in a stream: the last bit of a float32 may differ.
    np.testing.assert_allclose(joined(messages), expected, atol=0 if rate_hz == 24_000 else 1e-6)
    pieces = [message for message in messages if isinstance(message, Waveform)]
    assert len(pieces) == len(messages)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.samples) % FRAME == 0 for piece in pieces)
    assert all(len(piece.samples) <= max(FRAME, piece_seconds * 24_000) for piece in pieces[:-1])


@pytest.mark.parametrize("num_samples", [1_920, 1_921, 24_000, 50_000, 131_072, 131_073, 300_000])
def test_the_number_of_samples_follows_from_the_number_of_frames(tmp_path: Path, num_samples: int) -> None:
    messages = load(wav(np.zeros(num_samples, np.float32)), tmp_path)
    assert len(joined(messages)) == PADDING.num_frames(num_samples) * FRAME


def test_16_bit_audio_at_the_models_rate_passes_bit_exact(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-32768, 32768, 30_000)
    samples = values.astype(np.float32) / 32768
    start = PADDING.prefix_samples
    np.testing.assert_array_equal(joined(load(wav(samples), tmp_path))[start : start + 30_000], samples)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_tone_loudness_and_length(tmp_path: Path, rate_hz: int) -> None:
    messages = load(wav(sine(2.0, rate_hz=rate_hz, tone_hz=1000.0), rate_hz=rate_hz), tmp_path)
    heard = joined(messages)[PADDING.prefix_samples :][:48_000]
    middle = slice(4_800, 43_200)  # away from the edges, where the filter meets silence
    np.testing.assert_allclose(heard[middle], sine(2.0, tone_hz=1000.0)[middle], atol=1e-4)
    facts = messages[-1].facts
    assert facts is not None
    assert facts.duration_seconds == pytest.approx(2.0)


# --- facts


@pytest.mark.parametrize(("rate_hz", "channels"), [(24_000, 1), (44_100, 2), (16_000, 6)])
def test_facts_are_those_of_the_source(tmp_path: Path, rate_hz: int, channels: int) -> None:
    data = wav(np.zeros((rate_hz, channels), np.float32), rate_hz=rate_hz)
    messages = load(data, tmp_path, piece_seconds=0.5)
    assert [message.facts for message in messages[:-1]] == [None] * (len(messages) - 1)
    facts = messages[-1].facts
    assert facts is not None
    assert facts.duration_seconds == pytest.approx(1.0)
    assert (facts.sampling_rate_hz, facts.channels) == (rate_hz, channels)
    assert facts.content_sha256 == hashlib.sha256(data).hexdigest()


def test_a_failure_says_what_was_learnt_before_it(tmp_path: Path) -> None:
    data = wav(sine(4.0))
    cut_short = failure(load(data[: len(data) // 2], tmp_path))
    assert cut_short.facts.content_sha256 == hashlib.sha256(data[: len(data) // 2]).hexdigest()
    assert cut_short.facts.duration_seconds == pytest.approx(2.0, abs=0.01)
    assert (cut_short.facts.sampling_rate_hz, cut_short.facts.channels) == (24_000, 1)
    assert failure(load(b"no audio", tmp_path)).facts.content_sha256 == hashlib.sha256(b"no audio").hexdigest()


def test_a_remote_file_gives_what_a_local_one_gives(tmp_path: Path) -> None:
    data = encoded(sine(3.0), container="flac", codec="flac")
    uri = f"memory://{uuid.uuid4().hex}/a.flac"
    Storage().create(uri, data)
    remote = list(LoadStage(Storage(), PADDING).run([Source(id="x", uri=uri)]))
    local = load(data, tmp_path)
    np.testing.assert_array_equal(joined(remote), joined(local))
    assert remote[-1].facts == local[-1].facts


# --- order and laziness


def test_a_bad_input_hurts_no_other(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"<html>404</html>")
    (tmp_path / "good.wav").write_bytes(wav(sine(1.0)))
    bad = Source(id="bad", uri=str(tmp_path / "bad.wav"))
    missing = Source(id="missing", uri=str(tmp_path / "missing.wav"))
    good = Source(id="good", uri=str(tmp_path / "good.wav"))
    earlier = Failure(source=Source(id="earlier", uri="-"), stage="plan", code="NOT_FOUND", message="-")
    messages = list(LoadStage(Storage(), PADDING).run([good, bad, earlier, missing, good]))
    assert [message.source.id for message in messages] == ["good", "bad", "earlier", "missing", "good"]
    assert messages[2] is earlier
    assert [message.code for message in messages if isinstance(message, Failure)] == [
        "UNSUPPORTED_FORMAT",
        "NOT_FOUND",
        "NOT_FOUND",
    ]
    assert all(message.stage == "load" for message in messages if isinstance(message, Failure) and message != earlier)


def test_nothing_is_pulled_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(sine(3.0)))
    pulled: list[str] = []

    def inbox() -> Iterator[Source]:
        for name in "ab":
            pulled.append(name)
            yield Source(id=name, uri=str(tmp_path / "a.wav"))

    messages = LoadStage(Storage(), PADDING, piece_seconds=1.0).run(inbox())
    assert inspect.isgenerator(messages)
    assert pulled == []
    for message in messages:
        assert pulled == ["a"]
        if isinstance(message, Waveform) and message.is_last:
            break
    next(messages)
    assert pulled == ["a", "b"]
    messages.close()


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    def peak_bytes(seconds: float) -> int:
        path = tmp_path / "long.wav"
        path.write_bytes(wav(np.zeros(int(seconds * 8_000), np.float32), rate_hz=8_000))
        tracemalloc.start()
        for _ in LoadStage(Storage(), PADDING, piece_seconds=10.0).run([Source(id="x", uri=str(path))]):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(1.0)  # first use allocates what stays
    # Ten minutes are 58 MB of samples. What is allowed for is the buffer of the hash, which a longer file fills.
    assert peak_bytes(600.0) < peak_bytes(120.0) + 9_000_000


# --- what goes wrong


def test_hostile_inputs_get_their_code(tmp_path: Path) -> None:
    cases = {
        b"": "EMPTY_AUDIO",
        wav(np.zeros(1, np.float32)): "EMPTY_AUDIO",
        wav(np.zeros(1_919, np.float32)): "EMPTY_AUDIO",
        wav(np.zeros(0, np.float32)): "EMPTY_AUDIO",
        b"<!doctype html><title>403</title>": "UNSUPPORTED_FORMAT",
        wav(sine(4.0))[:90_000]: "TRUNCATED",
    }
    for data, code in cases.items():
        found = failure(load(data, tmp_path))
        assert found.code == code
        assert len(found.message) > 20


def test_too_short_says_how_short(tmp_path: Path) -> None:
    message = failure(load(wav(np.zeros(100, np.float32), rate_hz=8_000), tmp_path)).message
    assert "100 samples at 8000 Hz, 12.5 ms" in message
    assert "80 ms" in message


def test_one_frame_is_enough(tmp_path: Path) -> None:
    assert isinstance(load(wav(np.zeros(640, np.float32), rate_hz=8_000), tmp_path)[-1], Waveform)


def test_nothing_follows_a_failure(tmp_path: Path) -> None:
    data = encoded(sine(20.0), container="flac", codec="flac")
    messages = load(data[: len(data) // 2], tmp_path, piece_seconds=0.5)
    assert failure(messages).code == "TRUNCATED"
    assert all(isinstance(message, Waveform) and not message.is_last for message in messages[:-1])
    assert len(messages) > 2


def test_a_missing_file_and_an_unreadable_one(tmp_path: Path) -> None:
    stage = LoadStage(Storage(), PADDING)
    for uri, code in [
        (f"{tmp_path}/missing.wav", "NOT_FOUND"),
        ("memory://nowhere/missing.wav", "NOT_FOUND"),
        ("a\0b.wav", "NOT_FOUND"),
        (str(tmp_path), "FETCH_FAILED"),  # a folder cannot be read as a file
    ]:
        (message,) = stage.run([Source(id="x", uri=uri)])
        assert isinstance(message, Failure)
        assert (message.code, message.stage) == (code, "load")


class _BreakingFile(io.BytesIO):
    """The network goes away after 1,000 bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 1_000:
            raise OSError("connection lost")
        return super().read(min(1_000, size) if size and size > 0 else 1_000)


class _BreakingStorage(Storage):
    def open(self, uri: str) -> io.BytesIO:
        return _BreakingFile(wav(sine(1.0)))

    def download(self, uri: str, out: BinaryIO) -> None:
        shutil.copyfileobj(self.open(uri), out)


def test_a_fetch_that_breaks_off_is_not_the_files_fault() -> None:
    (message,) = LoadStage(_BreakingStorage(), PADDING).run([Source(id="x", uri="s3://bucket/a.wav")])
    assert isinstance(message, Failure)
    assert message.code == "FETCH_FAILED"
    assert "connection lost" in message.message


# --- probing


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame")])
def test_headers_tell_the_duration(tmp_path: Path, container: str, codec: str) -> None:
    (tmp_path / "a").write_bytes(encoded(sine(5.0), container=container, codec=codec))
    [seconds] = probe_seconds(Storage(), [Source(id="a", uri=str(tmp_path / "a"))])
    assert seconds == pytest.approx(5.0, abs=0.1)


def test_unknown_durations_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"no audio at all")
    (tmp_path / "empty").write_bytes(b"")
    sources = [Source(id=name, uri=str(tmp_path / name)) for name in ("a", "empty", "missing")]
    assert probe_seconds(Storage(), sources) == [None, None, None]


def test_an_accident_nobody_foresaw_ends_one_input_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(wav(sine(0.5)))
    real = pipeline.load.decode

    def decode_with_an_accident(file: BinaryIO, **options: float) -> Iterator[Pcm]:
        if getattr(file, "name", "").endswith("a.wav"):
            raise ZeroDivisionError("a codec's own")
        return real(file, **options)

    monkeypatch.setattr(pipeline.load, "decode", decode_with_an_accident)
    sources = [Source(id=name, uri=str(tmp_path / name)) for name in ("a.wav", "b.wav")]
    messages = list(LoadStage(Storage(), PADDING).run(sources))
    assert isinstance(messages[0], Failure)
    assert messages[0].code == "DECODE_FAILED"
    assert "ZeroDivisionError" in messages[0].message
    assert {message.source.id for message in messages[1:]} == {"b.wav"}
    assert isinstance(messages[-1], Waveform)


def test_a_decoder_that_wants_too_much_memory_costs_its_input_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(file: BinaryIO, **options: float) -> Iterator[Pcm]:
        raise MemoryError

    monkeypatch.setattr(pipeline.load, "decode", greedy)
    found = failure(load(wav(sine(1.0)), tmp_path))
    assert found.code == "DECODE_FAILED"
    assert "stages.load.memory_gib" in found.message


# --- parts of files


def sources_in(path: Path) -> list[Source]:
    return [one.source for one in discover([str(path)], Storage()).found]


def test_a_recording_sounds_the_same_wherever_it_lies(tmp_path: Path) -> None:
    recording = encoded(sine(2.0), container="flac", codec="flac")
    (tmp_path / "a.flac").write_bytes(recording)
    put_tar(tmp_path / "b.tar", {"x.flac": recording})
    cells = [(recording, None), (None, "a.flac")]
    put_parquet(tmp_path / "c.parquet", audio_table(cells))
    put_lines(tmp_path / "d.jsonl", {"audio_filepath": "a.flac"})
    expected = load(recording, tmp_path)
    for name, num_sources in [("a.flac", 1), ("b.tar", 1), ("c.parquet", 2), ("d.jsonl", 1)]:
        sources = sources_in(tmp_path / name)
        assert len(sources) == num_sources
        for source in sources:
            messages = list(LoadStage(Storage(), PADDING).run([source]))
            np.testing.assert_array_equal(joined(messages), joined(expected))
            assert messages[-1].facts == expected[-1].facts


@pytest.mark.parametrize("rate_hz", [8_000, 24_000])
def test_a_segment_is_a_recording_of_its_own(tmp_path: Path, rate_hz: int) -> None:
    noise = np.random.default_rng(0).integers(-9000, 9000, rate_hz * 40).astype(np.float32) / 32768
    data = wav(noise, rate_hz=rate_hz)
    (tmp_path / "a.wav").write_bytes(data)
    lines = [{"audio_filepath": "a.wav", "offset": at, "duration": 1.25} for at in (0, 3.5, 30.25)]
    put_lines(tmp_path / "m.jsonl", *lines, {"audio_filepath": "a.wav", "offset": 38.5})
    sources = sources_in(tmp_path / "m.jsonl")
    assert len(sources) == 4
    for source in sources:
        messages = list(LoadStage(Storage(), PADDING).run([source]))
        assert isinstance(source.place, Segment)
        start = round(source.place.start_seconds * rate_hz)
        part = noise[start : start + round((source.place.duration_seconds or 1.5) * rate_hz)]
        np.testing.assert_allclose(joined(messages), one_shot(part, rate_hz, PADDING), atol=1e-6)
        facts = messages[-1].facts
        assert facts is not None
        assert facts.duration_seconds == pytest.approx(len(part) / rate_hz)
        assert facts.content_sha256 == hashlib.sha256(data).hexdigest()


def test_what_planning_found_at_fault_is_a_row_and_opens_nothing(tmp_path: Path) -> None:
    put_lines(tmp_path / "m.jsonl", {"audio_filepath": "gone.wav", "offset": 1}, "no json")
    bad, gone = sorted(sources_in(tmp_path / "m.jsonl"), key=lambda source: source.fault is None)
    stage = LoadStage(Storage(), PADDING)
    failures = [failure([message]) for message in stage.run([bad, gone])]
    assert [message.code for message in failures] == ["BAD_CONTAINER", "NOT_FOUND"]
    assert f"line 2 of {tmp_path}/m.jsonl is not JSON" in failures[0].message
    assert f"{tmp_path}/gone.wav does not exist" in failures[1].message


def test_bad_parts_hurt_no_other_part(tmp_path: Path) -> None:
    good = wav(sine(0.5))
    path = put_tar(tmp_path / "a.tar", {"0.wav": good, "1.wav": b"no audio", "2.wav": b"", "3.wav": good})
    messages = list(LoadStage(Storage(), PADDING).run(sources_in(path)))
    codes = [message.code if isinstance(message, Failure) else "ok" for message in messages]
    assert codes == ["ok", "UNSUPPORTED_FORMAT", "EMPTY_AUDIO", "ok"]


def test_a_segment_that_the_recording_does_not_reach_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(sine(2.0)))
    put_lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "offset": 1.0, "duration": 4.0})
    found = failure(list(LoadStage(Storage(), PADDING).run(sources_in(tmp_path / "m.jsonl"))))
    assert found.code == "TRUNCATED"
    assert "the recording ends at 2.00 s" in found.message


def loaded(data: bytes, folder: Path, *, longest_seconds: float) -> list[Waveform | Failure]:
    (folder / "input.bin").write_bytes(data)
    stage = LoadStage(Storage(), PADDING, piece_seconds=1.0, longest_seconds=longest_seconds)
    return list(stage.run([Source(id="x", uri=str(folder / "input.bin"))]))


def test_what_is_longer_than_allowed_is_refused_by_its_header(tmp_path: Path) -> None:
    found = loaded(wav(sine(8.0)), tmp_path, longest_seconds=7.9)
    assert [failure(found).code] == [message.code for message in found if isinstance(message, Failure)] == ["TOO_LONG"]
    assert len(found) == 1, "before anything was decoded"
    assert "promises 0.0 h, and input.max_audio_hours is 0.00219444" in failure(found).message
    assert "--retry-errors TOO_LONG" in failure(found).message
    assert joined(loaded(wav(sine(8.0)), tmp_path, longest_seconds=8.0)).any()


def test_what_goes_on_beyond_the_limit_without_a_promise_is_stopped_there(tmp_path: Path) -> None:
    endless = encoded(sine(30.0), container="adts", codec="aac")
    found = loaded(endless, tmp_path, longest_seconds=10.0)
    assert failure(found).code == "TOO_LONG"
    assert "still goes on" in failure(found).message
    assert sum(len(piece.samples) for piece in found[:-1] if isinstance(piece, Waveform)) < 20 * 24_000


def test_of_a_long_recording_a_short_segment_is_not_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(wav(sine(30.0)))
    place = Segment(file_uri=str(path), start_seconds=22.0, duration_seconds=3.0)
    stage = LoadStage(Storage(), PADDING, longest_seconds=4.0)
    messages = list(stage.run([Source(id="x", uri=f"{path}#t=22,25", place=place)]))
    assert isinstance(messages[-1], Waveform)
    assert messages[-1].is_last
