"""Inputs as a corpus from the wild has them: recordings that were damaged on the way, and files that never were audio.

Everything follows from a seed. What is known of the recording an input was made of goes with it, so that a success can
be held against the truth.
"""

import gzip
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import soxr
from numpy.typing import NDArray

from tests.make_audio import encoded, video_without_sound, wav
from tests.speech import bundled, samples_of

SECONDS = 6.0  # of every recording
# Container, codec, rate, layout of each recording.
FORMATS: Mapping[str, tuple[str, str, int, str]] = {
    "wav": ("wav", "pcm_s16le", 24_000, "mono"),
    "wav-float": ("wav", "pcm_f32le", 48_000, "stereo"),
    "wav-mulaw": ("wav", "pcm_mulaw", 8_000, "mono"),
    "wav-adpcm": ("wav", "adpcm_ms", 16_000, "mono"),
    "wav-8-channels": ("wav", "pcm_s16le", 16_000, "7.1"),
    "w64": ("w64", "pcm_s16le", 24_000, "mono"),
    "flac": ("flac", "flac", 44_100, "stereo"),
    "mp3": ("mp3", "libmp3lame", 44_100, "stereo"),
    "mp3 without index": ("mp3", "libmp3lame", 24_000, "mono"),
    "mp3-8k": ("mp3", "libmp3lame", 8_000, "mono"),
    "opus": ("ogg", "libopus", 48_000, "mono"),
    "ogg-flac": ("ogg", "flac", 16_000, "mono"),
    "m4a": ("mp4", "aac", 44_100, "stereo"),
    "mov": ("mov", "pcm_s16le", 24_000, "mono"),
    "adts": ("adts", "aac", 44_100, "mono"),
    "mpegts": ("mpegts", "aac", 48_000, "stereo"),
    "webm": ("webm", "libopus", 48_000, "mono"),
    "mka": ("matroska", "flac", 44_100, "mono"),
    "aiff": ("aiff", "pcm_s16be", 22_050, "mono"),
    "au": ("au", "pcm_s16be", 16_000, "mono"),
    "caf": ("caf", "pcm_s16le", 24_000, "mono"),
    "wma": ("asf", "wmav2", 44_100, "stereo"),
    "flv": ("flv", "aac", 44_100, "mono"),
    "ac3": ("ac3", "ac3", 48_000, "5.1"),
    "wavpack": ("wv", "wavpack", 44_100, "mono"),
    "tta": ("tta", "tta", 24_000, "mono"),
}
# Raw streams: nothing in them says how long they are, so one that lost its end, cleanly, is a shorter recording.
_WITHOUT_LENGTH = frozenset({"adts", "ac3", "mpegts", "mp3 without index"})
_REMOVING = frozenset({"end cut off", "bytes lost", "head lost"})
_EXTREMES = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x01\x00\x00\x00",
)
_HEADER_BYTES = 160


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hostile:
    """One input, and what is true of it."""

    name: str  # as SEED-KIND-FORMAT
    kind: str  # how it was made
    format: str
    data: bytes
    true_seconds: float  # of the recording it was made of; 0 where there was none


def hostile(seed: int) -> Hostile:
    """The input of a seed."""
    rng = random.Random(f"hostile {seed}")
    if rng.random() < 0.08:
        kind = rng.choice(list(_IMPOSTORS))
        return Hostile(
            name=f"{seed}-{kind}", kind="no audio", format=kind, data=_IMPOSTORS[kind](rng), true_seconds=0.0
        )
    format = rng.choice(list(FORMATS))
    data, kind = recording(format, rng.randrange(4)), rng.choice(list(_DAMAGES))
    num_bytes = len(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        data = _DAMAGES[kind](rng, data)
    true_seconds = SECONDS
    if format in _WITHOUT_LENGTH and kind in _REMOVING:
        true_seconds *= min(1.0, len(data) / num_bytes)
    return Hostile(name=f"{seed}-{kind}-{format}", kind=kind, format=format, data=data, true_seconds=true_seconds)


@cache
def recording(format: str, number: int) -> bytes:
    """A recording of `SECONDS` in a format; speech, so that codecs have something to do."""
    container, codec, rate_hz, layout = FORMATS[format]
    options = {"write_xing": "0"} if format == "mp3 without index" else None
    samples = _speech(number, rate_hz)
    return encoded(samples, container=container, codec=codec, rate_hz=rate_hz, layout=layout, options=options)


@cache
def _speech(number: int, rate_hz: int) -> NDArray[np.float32]:
    pool = bundled()[number::4]
    samples = np.concatenate([samples_of(path) for path in pool])
    samples = np.resize(samples, round(SECONDS * 24_000))
    return samples if rate_hz == 24_000 else soxr.resample(samples, 24_000, rate_hz).astype(np.float32)


def _flip_bits(rng: random.Random, data: bytes, *, ratio: float) -> bytes:
    damaged = bytearray(data)
    for _ in range(max(1, round(len(data) * 8 * ratio))):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 64, 1_000, len(data) // 10, len(data) // 2]))


def _cut_end(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([1, 4, 12, 44, 100, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))])]


def _zero_span(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def _drop_span(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _noise_span(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _repeat_span(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:]


def _lose_head(rng: random.Random, data: bytes) -> bytes:
    return data[rng.choice([1, 4, 44, 512, 4096, len(data) // 3]) :]


def _add_head(rng: random.Random, data: bytes) -> bytes:
    before = [rng.randbytes(997), bytes(4096), b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"ID3\x04\x00\x00\x00\x00\x7f\x7f"]
    return rng.choice(before) + data


def _add_tail(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([rng.randbytes(50_000), bytes(100_000), data, b"\n<html>", recording("mp3", 0)])


def _extreme_header(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(min(_HEADER_BYTES, len(data)))
    value = rng.choice(_EXTREMES)[: rng.choice([1, 2, 4])]
    return data[:place] + value + data[place + len(value) :]


def _as_text(rng: random.Random, data: bytes) -> bytes:
    """What a download in text mode makes of it."""
    return rng.choice(
        [
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.decode("latin-1").encode("utf-8"),
            lambda: data.decode("utf-8", "replace").encode("utf-8"),
        ]
    )()


_DAMAGES: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "few bits flipped": lambda rng, data: _flip_bits(rng, data, ratio=2e-5),
    "many bits flipped": lambda rng, data: _flip_bits(rng, data, ratio=rng.choice([2e-4, 2e-3, 2e-2])),
    "end cut off": _cut_end,
    "zeros inside": _zero_span,
    "bytes lost": _drop_span,
    "noise inside": _noise_span,
    "bytes twice": _repeat_span,
    "head lost": _lose_head,
    "something before it": _add_head,
    "something after it": _add_tail,
    "header value": _extreme_header,
    "text mode": _as_text,
}


def _broken_wav(rng: random.Random) -> bytes:
    channels, bits = rng.choice([0, 1, 2, 255, 65535]), rng.choice([0, 1, 7, 8, 16, 24, 32, 64, 255])
    rate_hz, tag = (
        rng.choice([0, 1, 8_000, 10_000_000, 2**32 - 1]),
        rng.choice([0, 1, 2, 3, 0x11, 0x55, 0x7777, 0xFFFE]),
    )
    align = rng.choice([0, 1, 2, channels * bits // 8 & 0xFFFF])
    size = rng.choice([0, 1, 2**31 - 1, 2**32 - 1])
    fmt = struct.pack("<HHIIHH", tag, channels, rate_hz, rng.choice([0, rate_hz * align & 0xFFFFFFFF]), align, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + rng.randbytes(2_000)
    return b"RIFF" + struct.pack("<I", rng.choice([0, len(body), 2**32 - 1])) + body


_IMPOSTORS: Mapping[str, Callable[[random.Random], bytes]] = {
    "nothing": lambda _: b"",
    "html": lambda _: b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>",
    "s3 error": lambda _: b'<?xml version="1.0"?><Error><Code>SlowDown</Code></Error>',
    "json": lambda _: b'{"message": "not found"}',
    "lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n",
    "playlist": lambda _: b"#EXTM3U\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
    "concat list": lambda _: b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    "zeros": lambda rng: bytes(rng.choice([1, 1_000, 100_000])),
    "noise": lambda rng: rng.randbytes(rng.choice([1, 100, 60_000])),
    "gzip": lambda _: gzip.compress(recording("wav", 0), mtime=0),
    "picture": lambda rng: b"\x89PNG\r\n\x1a\n" + rng.randbytes(3_000),
    "pdf": lambda rng: b"%PDF-1.7\n" + rng.randbytes(3_000),
    "video without sound": lambda _: video_without_sound(),
    "wav of nothing": lambda _: wav(np.zeros(0, np.float32)),
    "wav header": _broken_wav,
}
