"""Bytes that a demuxer passes over inside of a file are noticed; what belongs between packets is not taken for them."""

import io

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame

from pipeline.decode_audio import decode
from pipeline.errors import InputError
from tests.hostile import FORMATS, SECONDS, recording

DAMAGED = ["adts", "ac3", "mp3 without index", "flv", "webm", "mka", "ogg-flac", "opus", "mpegts", "wma"]


def seconds_of(data: bytes) -> float:
    return sum(len(block.samples) / block.rate_hz for block in decode(io.BytesIO(data)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_file_has_no_holes(format: str) -> None:
    assert seconds_of(recording(format, 1)) == pytest.approx(SECONDS, abs=0.15)


@pytest.mark.parametrize("filling", ["zeros", "noise"])
@pytest.mark.parametrize("format", DAMAGED)
def test_a_fifth_of_a_file_overwritten_is_damage(format: str, filling: str) -> None:
    data = recording(format, 1)
    start, length = int(len(data) * 0.45), len(data) // 5
    hole = bytes(length) if filling == "zeros" else np.random.default_rng(0).bytes(length)
    with pytest.raises(InputError) as caught:
        seconds_of(data[:start] + hole + data[start + length :])
    assert caught.value.code in ("DECODE_FAILED", "TRUNCATED")


@pytest.mark.parametrize("format", ["mp3", "mp3 without index"])
def test_episodes_joined_into_one_file_keep_their_tags_between_them(format: str) -> None:
    picture = bytes(range(256)) * 400
    size = bytes((len(picture) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    joined = recording(format, 1) + b"ID3\x04\x00\x00" + size + picture + recording(format, 2)
    assert seconds_of(joined) == pytest.approx(2 * SECONDS, abs=0.3)


def test_silence_that_a_recorder_left_out_is_no_damage() -> None:
    sink = io.BytesIO()
    with av.open(sink, "w", format="webm") as output:
        stream = output.add_stream("libopus", rate=48_000, layout="mono")
        rng = np.random.default_rng(0)
        for number in range(200):
            samples = rng.normal(0, 0.1, (1, 960)).astype(np.float32)
            frame = AudioFrame.from_ndarray(samples, format="flt", layout="mono")
            frame.sample_rate = 48_000
            frame.pts = number * 960 + (480_000 if number >= 100 else 0)  # ten seconds of nothing half-way
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert 3.9 < seconds_of(sink.getvalue()) < 4.2


@pytest.mark.parametrize("format", ["wma", "flv", "webm", "mp3", "flac", "caf", "w64", "aiff"])
def test_a_file_that_lost_its_second_half_is_truncated(format: str) -> None:
    data = recording(format, 1)
    with pytest.raises(InputError) as caught:
        seconds_of(data[: len(data) // 2])
    assert caught.value.code == "TRUNCATED"


def test_a_tune_in_an_ogg_file_with_a_page_of_something_else_behind_it_is_whole() -> None:
    assert seconds_of(recording("opus", 1) + b"<html>" + bytes(50_000)) == pytest.approx(SECONDS, abs=0.15)
