import io
import struct

import av
import numpy as np
import pytest

from pipeline.audio_headers import Promise, is_cut_mp4, known_audio, read_promise
from tests.make_audio import encoded, sine, wav


def promise_of(data: bytes) -> Promise | None:
    file = io.BytesIO(data)
    with av.open(file) as container:
        return read_promise(file, container, container.streams.audio[0])


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [
        ("wav", "pcm_s16le", 24_000),
        ("flac", "flac", 24_000),
        ("mp3", "libmp3lame", 24_000),
        ("mp4", "aac", 24_000),
        ("matroska", "libopus", 48_000),
        ("ogg", "libopus", 48_000),
    ],
)
def test_finished_files_promise_their_duration(container: str, codec: str, rate_hz: int) -> None:
    promise = promise_of(encoded(sine(3.0, rate_hz=rate_hz), container=container, codec=codec, rate_hz=rate_hz))
    assert promise is not None
    assert promise.seconds == pytest.approx(3.0, abs=0.05)
    assert "header" in promise.where


def test_a_guess_is_no_promise() -> None:
    assert promise_of(encoded(sine(3.0), container="adts", codec="aac")) is None
    assert promise_of(encoded(sine(3.0), container="mp3", codec="libmp3lame", options={"write_xing": "0"})) is None
    assert promise_of(encoded(sine(3.0), container="wav", codec="libmp3lame")) is None


def test_chunks_before_the_samples_are_passed_over() -> None:
    data = wav(sine(1.0))
    with_list = data[:36] + b"LIST" + struct.pack("<I", 5) + b"INFOx\0" + data[36:]
    assert promise_of(with_list) == promise_of(data)


def test_reading_a_promise_keeps_the_position() -> None:
    file = io.BytesIO(wav(sine(1.0)))
    with av.open(file) as container:
        file.seek(123)
        read_promise(file, container, container.streams.audio[0])
    assert file.tell() == 123


def test_an_id3_tag_does_not_hide_the_index_of_an_mp3() -> None:
    data = encoded(sine(3.0), container="mp3", codec="libmp3lame", options={"write_id3v2": "0", "id3v2_version": "0"})
    tag = b"ID3\x03\x00\x00" + bytes([0, 1, 0x10, 0]) + bytes((1 << 14) + (0x10 << 7))  # a cover picture's worth
    promise = promise_of(tag + data)
    assert promise is not None
    assert promise.seconds == pytest.approx(3.0, abs=0.05)


def test_an_mp4_is_cut_when_its_last_box_is() -> None:
    data = encoded(sine(1.0), container="mp4", codec="aac")
    for length in range(0, len(data) + 1, 7):
        part = data[:length]
        if length >= 36:  # `ftyp` and a little more
            assert is_cut_mp4(io.BytesIO(part), part[:64])
    assert not is_cut_mp4(io.BytesIO(data), data[:64])
    assert not is_cut_mp4(io.BytesIO(wav(np.zeros(100, np.float32))), b"RIFF")
    huge = data[:28] + struct.pack(">I4sQ", 1, b"mdat", 2**40)
    assert is_cut_mp4(io.BytesIO(huge), huge)


def test_known_audio() -> None:
    assert known_audio(wav(np.zeros(1, np.float32))) == "a RIFF (wav) file"
    assert known_audio(b"<html>") is None
    assert known_audio(b"") is None
