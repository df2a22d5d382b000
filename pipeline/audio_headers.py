"""What the headers of an audio file say about it: what it is, and how much of it there should be."""

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from av.audio.stream import AudioStream
from av.container import InputContainer

# Where, in the first bytes, which bytes say that this is (meant to be) sound.
_MAGIC = (
    (0, b"RIFF", "a RIFF (wav) file"),
    (0, b"RF64", "an RF64 (wav) file"),
    (0, b"fLaC", "a FLAC file"),
    (0, b"OggS", "an Ogg file"),
    (0, b"ID3", "an MP3 file"),
    (0, b"\xff\xfb", "an MP3 file"),
    (0, b"\xff\xf3", "an MP3 file"),
    (0, b"\xff\xf1", "an AAC file"),
    (4, b"ftyp", "an MP4 file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (0, b"FORM", "an AIFF file"),
    (0, b"caff", "a CAF file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b".snd", "an AU file"),
    (0, b"wvpk", "a WavPack file"),
    (0, b"\x30\x26\xb2\x75", "an ASF (wma) file"),
    (0, b"NIST_1A", "a NIST SPHERE file"),
)
# Containers whose writer went back to fill in the true length. Not mpegts, aac, amr: theirs is ffmpeg's guess.
_FINISHED = frozenset({"flac", "mov,mp4,m4a,3gp,3g2,mj2", "aiff", "au", "tta", "wv", "ape", "ogg"})
_FINISHED_AS_A_WHOLE = frozenset({"matroska,webm", "flv"})  # they declare it for all streams together
_STREAMING_BYTES = 0x7FFF_0000  # sox, ffmpeg and others write this or more where they could not know the size
# An MP3 says in its first frame how many it has, or nowhere. Where the number is, counted from each of these marks.
_MP3_INDEX = {b"Xing": 8, b"Info": 8, b"VBRI": 14}
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the object that holds the length, and so on
_MPEG1_RATES_HZ = (32_000, 44_100, 48_000)  # with 1152 samples per frame; the lower ones of MPEG 2 have 576


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """How much audio a header says there is, and which header.

    With `may_have_gaps`, packets carry their own times, and a recorder may have left silence out.
    """

    seconds: float
    where: str
    may_have_gaps: bool


def known_audio(head: bytes) -> str | None:
    """What kind of audio file begins like this, in words; None if none does."""
    return next((name for start, magic, name in _MAGIC if head[start:].startswith(magic)), None)


def read_promise(file: BinaryIO, container: InputContainer, stream: AudioStream) -> Promise | None:
    """The duration the container declares, where it can be trusted; the position in the file is kept."""
    name = container.format.name
    position = file.tell()
    try:
        if name == "wav" and (stream.codec_context.name or "").startswith("pcm_"):
            seconds = _wav_seconds(file)  # ffmpeg quietly lowers its own to what the file holds
        elif name in _FINISHED:
            seconds = _stream_seconds(stream)
        elif name == "w64":
            seconds = _w64_seconds(file)
        elif name == "caf":
            seconds = _caf_seconds(file)
        elif name == "asf":  # ffmpeg's own is lowered to what the file holds
            seconds = _asf_seconds(file)
        elif name == "mp3":  # ffmpeg's own is a guess where more follows than the index knows of
            seconds = _mp3_seconds(file, stream.codec_context.sample_rate)
        elif (
            name in _FINISHED_AS_A_WHOLE and len(container.streams) == 1
        ):  # with a video, this is the longer of the two
            seconds = (container.duration or 0) / 1_000_000
        else:
            seconds = None
    finally:
        file.seek(position)
    if not seconds:
        return None
    first_name = name.partition(",")[0]
    return Promise(
        seconds=seconds, where=f"the {first_name} header", may_have_gaps=first_name in ("mov", "matroska", "ogg")
    )


def is_cut_mp4(file: BinaryIO, head: bytes) -> bool:
    """Whether an MP4 file ends within one of its top-level boxes."""
    if head[4:8] != b"ftyp":
        return False
    end = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size = struct.unpack(">I", header[:4])[0]
        if size == 1 and len(header) == 16:  # the size did not fit and follows the type
            size = struct.unpack(">Q", header[8:])[0]
        if size < 8:  # 0: to the end of the file; else not a box
            return False
        position += size
    return position != end


def _stream_seconds(stream: AudioStream) -> float | None:
    if stream.duration is None or stream.time_base is None:
        return None
    return float(stream.duration * stream.time_base)


def _wav_seconds(file: BinaryIO) -> float | None:
    """Size of the data chunk over bytes per second; None for a stream whose header was never completed."""
    file.seek(0)
    if not file.read(12).startswith(b"RIFF"):  # RIFX counts from the other end; RF64 keeps the size elsewhere
        return None
    bytes_per_second = 0
    while len(header := file.read(8)) == 8:
        name, size_bytes = struct.unpack("<4sI", header)
        if name == b"data":
            is_streamed = size_bytes == 0 or size_bytes >= _STREAMING_BYTES
            return size_bytes / bytes_per_second if bytes_per_second and not is_streamed else None
        start = file.tell()
        if name == b"fmt " and len(chunk := file.read(16)) == 16:
            bytes_per_second = struct.unpack("<I", chunk[8:12])[0]
        file.seek(start + size_bytes + size_bytes % 2)
    return None


def _w64_seconds(file: BinaryIO) -> float | None:
    """As `_wav_seconds`. 16 bytes name a chunk, 8 are its size with these 24, and it is padded to a multiple of 8."""
    file.seek(40)
    bytes_per_second = 0
    while len(header := file.read(24)) == 24:
        size_bytes = struct.unpack("<Q", header[16:])[0] - 24
        start = file.tell()
        if header.startswith(b"data"):
            return size_bytes / bytes_per_second if bytes_per_second and 0 < size_bytes < 2**62 else None
        if header.startswith(b"fmt ") and len(chunk := file.read(16)) == 16:
            bytes_per_second = struct.unpack("<I", chunk[8:12])[0]
        if not 0 <= size_bytes < 2**62:
            return None
        file.seek(start + (size_bytes + 7) // 8 * 8)
    return None


def _caf_seconds(file: BinaryIO) -> float | None:
    """Packets in the data chunk times their length, where all are alike; a size of -1 is that of a stream."""
    file.seek(8)
    packet_bytes = packet_seconds = 0.0
    while len(header := file.read(12)) == 12:
        name, size_bytes = struct.unpack(">4sq", header)
        start = file.tell()
        if name == b"data":
            return (size_bytes - 4) / packet_bytes * packet_seconds if packet_bytes and size_bytes > 4 else None
        if name == b"desc" and len(chunk := file.read(24)) == 24:
            rate_hz, packet_bytes, packet_frames = struct.unpack(">d8xII", chunk)
            packet_seconds = packet_frames / rate_hz if rate_hz > 0 else 0.0
        if size_bytes < 0 or start + size_bytes >= 2**62:
            return None
        file.seek(start + size_bytes)
    return None


def _asf_seconds(file: BinaryIO) -> float | None:
    """The play duration of an ASF file's properties, without what is buffered before; None for a broadcast."""
    file.seek(0)
    head = file.read(8192)
    place = head.find(_ASF_PROPERTIES)
    fields = head[place + 64 : place + 92]
    if place < 0 or len(fields) < 28:
        return None
    duration_100ns, _, preroll_ms, flags = struct.unpack("<QQQI", fields)
    return None if flags & 1 else max(0.0, duration_100ns / 1e7 - preroll_ms / 1e3)


def _mp3_seconds(file: BinaryIO, rate_hz: int) -> float | None:
    """What the index in the first frame says; None without one."""
    file.seek(0)
    head = file.read(10)
    skipped = 0
    if head.startswith(b"ID3") and len(head) == 10:  # seven bits of size in each of four bytes
        skipped = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(skipped)
    first_frame = file.read(4096)
    for mark, offset in _MP3_INDEX.items():
        place = first_frame.find(mark)
        number = first_frame[place + offset : place + offset + 4]
        if place < 0 or len(number) < 4 or (mark != b"VBRI" and not first_frame[place + 7] & 1):
            continue
        num_samples = struct.unpack(">I", number)[0] * (1152 if rate_hz in _MPEG1_RATES_HZ else 576)
        return num_samples / rate_hz if rate_hz else None
    return None
