import io
import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.decode_audio import Pcm, Span, decode, decode_span, estimate_seconds
from pipeline.errors import InputError
from tests.make_audio import encoded, sine, video_without_sound, wav

CODECS = [
    ("wav", "pcm_s16le", 24_000),
    ("wav", "pcm_s24le", 24_000),
    ("wav", "pcm_f32le", 24_000),
    ("wav", "pcm_mulaw", 8_000),
    ("flac", "flac", 44_100),
    ("mp3", "libmp3lame", 44_100),
    ("adts", "aac", 44_100),
    ("mp4", "aac", 44_100),
    ("ogg", "libopus", 48_000),
    ("matroska", "libopus", 48_000),
    ("aiff", "pcm_s16be", 24_000),
    ("caf", "pcm_s16le", 24_000),
    ("mpegts", "aac", 44_100),
]


def samples_of(data: bytes) -> NDArray[np.float32]:
    return np.concatenate([block.samples for block in decode(io.BytesIO(data))])


def error_of(data: bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        list(decode(io.BytesIO(data)))
    return caught.value


@pytest.mark.parametrize(("container", "codec", "rate_hz"), CODECS)
def test_formats(container: str, codec: str, rate_hz: int) -> None:
    data = encoded(sine(2.0, rate_hz=rate_hz), container=container, codec=codec, rate_hz=rate_hz)
    blocks = list(decode(io.BytesIO(data)))
    assert {(block.rate_hz, block.channels) for block in blocks} == {(rate_hz, 1)}
    samples = np.concatenate([block.samples for block in blocks])
    assert samples.dtype == np.float32
    assert len(samples) / rate_hz == pytest.approx(2.0, abs=0.1)  # some containers keep the codec's own padding
    assert np.sqrt(np.mean(samples[rate_hz // 2 : rate_hz] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.06)
    assert estimate_seconds(io.BytesIO(data)) == pytest.approx(2.0, abs=0.15)


def test_blocks_do_not_grow_with_the_file() -> None:
    lengths = [len(block.samples) for block in decode(io.BytesIO(wav(np.zeros(1_000_000, np.float32))))]
    assert sum(lengths) == 1_000_000
    assert max(lengths) < 140_000


@pytest.mark.parametrize("channels", [2, 3, 6, 7, 8, 16, 24])
def test_every_channel_counts_the_same(channels: int) -> None:
    # swr would take one of six channels for a subwoofer and drop it, and add stereo at 0.71 each.
    for speaking in range(channels):
        columns = np.zeros((4_000, channels), np.float32)
        columns[:, speaking] = 0.5
        blocks = list(decode(io.BytesIO(wav(columns))))
        assert blocks[0].channels == channels
        np.testing.assert_allclose(blocks[0].samples, 0.5 / channels, rtol=1e-6)


@pytest.mark.parametrize("layout", ["stereo", "5.1", "7.1"])
@pytest.mark.parametrize("codec", ["flac", "aac"])  # aac decodes to planar frames, where 8 channels crashed PyAV
def test_a_voice_in_all_channels_keeps_its_loudness(layout: str, codec: str) -> None:
    data = encoded(sine(1.0), container={"flac": "flac", "aac": "adts"}[codec], codec=codec, layout=layout)
    loudness = np.sqrt(np.mean(samples_of(data)[6_000:18_000] ** 2))
    # AAC itself takes the tone out of the subwoofer, one channel of six or eight.
    assert loudness == pytest.approx(0.5 / np.sqrt(2), rel=0.2 if codec == "aac" else 0.01)


def test_the_rate_and_layout_may_change_on_the_way() -> None:
    one = encoded(sine(2.0), container="adts", codec="aac")
    other = encoded(sine(2.0, rate_hz=48_000), container="adts", codec="aac", rate_hz=48_000, layout="stereo")
    blocks = list(decode(io.BytesIO(one + other)))
    assert [(block.rate_hz, block.channels) for block in blocks] == [(24_000, 1), (48_000, 2)]
    assert [len(block.samples) / block.rate_hz for block in blocks] == pytest.approx([2.0, 2.0], abs=0.1)


# --- not audio


@pytest.mark.parametrize(
    "data",
    [
        b"<!doctype html><html><body>Not found</body></html>" * 20,
        b"just some words, " * 100,
        b"PK\x03\x04" + bytes(range(256)) * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        bytes(5_000),
        np.random.default_rng(0).bytes(20_000),
    ],
    ids=["html", "text", "zip", "png", "zeros", "noise"],
)
def test_what_is_no_audio_says_what_it_is(data: bytes) -> None:
    error = error_of(data)
    assert error.code == "UNSUPPORTED_FORMAT"
    assert repr(data[:8])[1:-1] in error.message
    assert "expected wav" in error.message


def test_the_name_of_a_file_does_not_make_it_audio() -> None:
    class Named(io.BytesIO):
        name = "page.flac"

    with pytest.raises(InputError) as caught:
        list(decode(Named(b"<!doctype html>" * 100)))
    assert caught.value.code == "UNSUPPORTED_FORMAT"


def test_a_playlist_cannot_make_us_read_another_file(tmp_path: object) -> None:
    secret = f"{tmp_path}/secret.wav"
    with open(secret, "wb") as file:
        file.write(wav(sine(1.0)))
    for playlist in (
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"v=0\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na=control:{secret}\n",
    ):
        assert error_of(playlist.encode()).code == "UNSUPPORTED_FORMAT"


def test_video_without_sound() -> None:
    error = error_of(video_without_sound())
    assert error.code == "UNSUPPORTED_FORMAT"
    assert "video" in error.message


@pytest.mark.parametrize("rate_hz", [1, 3_999, 768_001])
def test_a_rate_nobody_records_at(rate_hz: int) -> None:
    error = error_of(wav(sine(1.0), rate_hz=rate_hz))
    assert error.code == "UNSUPPORTED_FORMAT"
    assert f"{rate_hz} Hz" in error.message


# --- less than promised


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [
        ("wav", "pcm_s16le", 24_000),
        ("flac", "flac", 24_000),
        ("mp3", "libmp3lame", 24_000),
        ("mp4", "aac", 24_000),
        ("matroska", "libopus", 48_000),
        ("aiff", "pcm_s16be", 24_000),
    ],
)
def test_half_a_file_is_truncated(container: str, codec: str, rate_hz: int) -> None:
    data = encoded(sine(6.0, rate_hz=rate_hz), container=container, codec=codec, rate_hz=rate_hz)
    error = error_of(data[: len(data) // 2])
    assert error.code == "TRUNCATED"
    assert "6.0" in error.message or "moov" in error.message


def test_half_an_mp4_whose_index_comes_first_is_truncated() -> None:
    data = encoded(sine(6.0), container="mp4", codec="aac", options={"movflags": "faststart"})
    error = error_of(data[: len(data) // 2])
    assert error.code == "TRUNCATED"
    assert "6.0" in error.message


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_is_whole(size: int) -> None:
    data = wav(sine(2.0))
    piped = data[:4] + struct.pack("<I", size) + data[8:40] + struct.pack("<I", size) + data[44:]
    assert len(samples_of(piped)) == 48_000


def test_an_mp3_without_an_index_promises_nothing() -> None:
    data = encoded(sine(6.0), container="mp3", codec="libmp3lame", options={"write_xing": "0"})
    assert len(samples_of(data[: len(data) // 2])) / 24_000 == pytest.approx(3.0, abs=0.2)


def test_a_missing_fraction_of_a_second_is_no_reason() -> None:
    data = wav(sine(10.0))
    assert len(samples_of(data[: -24_000 * 2 * 2 // 10])) == 24_000 * 98 // 10


# --- damaged


def damaged(data: bytes, *, num_places: int) -> bytes:
    spoiled = bytearray(data)
    for place in np.linspace(len(data) // 4, len(data) * 9 // 10, num_places).astype(int):
        spoiled[place : place + 40] = b"\xff" * 40
    return bytes(spoiled)


def test_an_isolated_bad_packet_is_forgiven_and_many_are_not() -> None:
    noise = np.random.default_rng(0).standard_normal(24_000 * 8).astype(np.float32) * 0.1
    data = encoded(noise, container="flac", codec="flac")
    assert len(samples_of(damaged(data, num_places=1))) >= 24_000 * 7
    assert error_of(damaged(data, num_places=15)).code == "DECODE_FAILED"


def test_too_many_bad_packets_are_counted() -> None:
    error = error_of(damaged(encoded(sine(8.0), container="adts", codec="aac"), num_places=15))
    assert error.code == "DECODE_FAILED"
    assert "packets could not be decoded" in error.message


def test_damaged_headers_are_not_called_another_format() -> None:
    for data in (wav(sine(1.0))[:20], encoded(sine(1.0), container="ogg", codec="libopus", rate_hz=48_000)[:60]):
        assert error_of(data).code == "DECODE_FAILED"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(value: float) -> None:
    samples = sine(1.0)
    samples[10_000] = value
    data = encoded(samples, container="wav", codec="pcm_f32le")
    error = error_of(data)
    assert error.code == "DECODE_FAILED"
    assert "not a number" in error.message


@pytest.mark.parametrize(("container", "codec", "rate_hz"), CODECS)
def test_any_damage_ends_in_samples_or_an_input_error(
    container: str, codec: str, rate_hz: int, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encoded(sine(0.5, rate_hz=rate_hz), container=container, codec=codec, rate_hz=rate_hz)
    random = np.random.default_rng(0)
    for _ in range(25):
        spoiled = np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, len(spoiled) if random.random() < 0.5 else min(200, len(spoiled)), 8)
        spoiled[places] = random.integers(0, 256, 8)
        try:
            blocks = list(decode(io.BytesIO(spoiled[: random.integers(1, len(spoiled))].tobytes())))
        except InputError:
            continue
        assert all(isinstance(block, Pcm) and np.isfinite(block.samples).all() for block in blocks)
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_read_is_not_called_damaged() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 50_000:
                raise OSError("disk on fire")
            return super().read(size)

    with pytest.raises(OSError, match="disk on fire"):
        list(decode(Broken(wav(sine(4.0)))))


# --- spans

SPANNED = [
    ("wav", "pcm_s16le", 8_000),
    ("flac", "flac", 16_000),
    ("mp3", "libmp3lame", 22_050),
    ("mp4", "aac", 24_000),
    ("adts", "aac", 24_000),
    ("ogg", "libopus", 24_000),
    ("matroska", "libopus", 24_000),
    ("aiff", "pcm_s16be", 8_000),
]


def span_of(data: bytes, start: float, end: float | None) -> NDArray[np.float32]:
    blocks = decode_span(io.BytesIO(data), Span(start_seconds=start, end_seconds=end))
    return np.concatenate([np.zeros(0, np.float32), *(block.samples for block in blocks)])


@pytest.mark.parametrize(("container", "codec", "rate_hz"), SPANNED)
def test_a_span_is_what_decoding_all_gives_there(container: str, codec: str, rate_hz: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 45 * rate_hz).astype(np.float32)
    data = encoded(noise, container=container, codec=codec, rate_hz=rate_hz)
    whole = samples_of(data)
    rate_hz = next(iter(decode(io.BytesIO(data)))).rate_hz
    spans = [(0, 2), (0.3, 0.7), (5.00007, 6.3), (19.99, 20.01), (20.0, 22.0), (33.3331, 40.2), (41.5, None)]
    for start, end in spans:
        last = None if end is None else round(end * rate_hz)
        # Exactly, also after a jump: the second before a span is decoded and dropped, so that the codec has settled.
        np.testing.assert_array_equal(span_of(data, start, end), whole[round(start * rate_hz) : last])


@given(cuts=st.lists(st.floats(0, 3), min_size=1, max_size=6))
def test_neighbouring_spans_add_up_to_the_whole(cuts: list[float]) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 24_000).astype(np.float32)
    data = wav(samples, rate_hz=8_000)
    edges = sorted({round(cut, 3) for cut in cuts} | {0.0, 3.0})
    parts = [span_of(data, start, end) for start, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), samples_of(data))


@pytest.mark.parametrize(("start", "end"), [(1.0, 4.0), (5.0, 6.0), (2.5, None), (40.0, 41.0)])
def test_a_span_beyond_the_end_is_told(start: float, end: float | None) -> None:
    with pytest.raises(InputError) as caught:
        span_of(wav(np.zeros(16_000, np.float32), rate_hz=8_000), start, end)
    assert caught.value.code == "TRUNCATED"
    assert "the recording ends at 2.00 s" in caught.value.message


def test_an_end_that_was_rounded_up_is_no_fault() -> None:
    data = wav(np.zeros(16_000, np.float32), rate_hz=8_000)
    assert len(span_of(data, 1.0, 2.01)) == 8_000
    with pytest.raises(InputError, match="no sample"):
        span_of(data, 1.0, 1.00001)


def test_damage_counts_only_where_it_is_heard() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 480_000).astype(np.float32)
    data = bytearray(encoded(noise, container="flac", codec="flac"))
    data[len(data) * 3 // 4 :] = bytes(len(data) - len(data) * 3 // 4)
    with pytest.raises(InputError):
        samples_of(bytes(data))
    assert len(span_of(bytes(data), 1.0, 3.0)) == 48_000
    with pytest.raises(InputError):
        span_of(bytes(data), 16.0, 18.0)
