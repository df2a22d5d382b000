"""Encoded bytes -> mono float32 PCM at the rate of the source. PyAV is spoken here and nowhere else.

Whatever bytes come in, the answer is samples or an `InputError`. A file is only believed when it decoded whole: ffmpeg
by itself passes over damaged packets and over a missing second half without a word.
"""

import errno
import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.logging import set_level
from av.packet import Packet
from numpy.typing import NDArray

from pipeline.audio_headers import Promise, is_cut_mp4, known_audio, read_promise
from pipeline.errors import InputError
from pipeline.holes import Seams

# With any other level, ffmpeg's threads call into Python's logging, and that can deadlock with the interpreter lock.
set_level(None)

_BLOCK_SAMPLES = 128 * 1024  # per channel; smaller blocks cost calls, bigger ones only memory
_RATES_HZ = range(4_000, 768_001)  # below, speech is not intelligible, and 1 Hz would turn a kilobyte into an hour
_MAX_CHANNELS = 63  # ffmpeg's filters take no more
_ALLOWED_BAD_PACKETS = 2
_ALLOWED_BAD_SHARE = 0.01
_MISSING_SECONDS = 0.5  # codecs trim up to a few hundred milliseconds at the ends
_MISSING_SHARE = 0.02
_SEEK_FROM_SECONDS = 20.0  # what is nearer to the beginning is reached as fast by decoding
_SETTLE_SECONDS = 1.0  # codecs need some packets after a jump: 80 ms for Opus, ten frames for a low-rate MP3
# Containers whose packets carry their exact time after a jump. Matroska rounds to milliseconds, the others guess.
_SEEKABLE = frozenset({"wav", "w64", "flac", "ogg", "mp3", "aiff", "mov,mp4,m4a,3gp,3g2,mj2"})
_SUPPORTED = "wav, flac, mp3, m4a/mp4, ogg, opus, webm/mkv, aac, aiff, wma and most others that hold sound"

# Only what can hold sound, and nothing that names other files (hls, concat, dash, image sequences, sdp ...): a playlist
# named .wav must not make us read /etc/passwd or call a host.
_CONTAINERS = (
    "3gp,aa,aac,ac3,aea,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,g722,gsm,iff,ircam,loas,"
    "matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nsv,nut,ogg,oma,rm,sln,sox,spdif,tak,truehd,tta,voc,w64,"
    "wav,webm,wsd,wtv,wv,xwma,alaw,mulaw"
)
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
# PyAV reports most faults as an FFmpegError, and some that it finds itself as one of these.
_AV_ERRORS = (FFmpegError, ValueError, RuntimeError, LookupError, ArithmeticError)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pcm:
    """A block of decoded sound: mono float32 `[S]`, finite. `channels` is what the average was taken of."""

    samples: NDArray[np.float32]
    rate_hz: int
    channels: int


@dataclass(slots=True)
class _Tally:
    """What has been seen of a stream, to judge at its end whether to believe it."""

    num_packets: int = 0
    num_bad_packets: int = 0
    decoded_seconds: float = 0.0
    reached_seconds: float = 0.0  # on the file's own clock, which runs on where a recorder left silence out
    fault: str = ""  # the last one
    seams: Seams | None = None
    is_broken: bool = False  # the container could not be read to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a recording, in seconds of its own clock; `end_seconds` is None for its end."""

    start_seconds: float
    end_seconds: float | None


def decode(file: BinaryIO, *, longest_seconds: float = math.inf) -> Iterator[Pcm]:
    """Decode the first audio stream in blocks; memory does not grow with its length. The rate may change on the way.

    A file whose header promises more than `longest_seconds` is refused at once. What it holds beyond its promise is for
    the caller to count.

    Channels are averaged, all with the same weight. swr's own mono mix is not used: it adds 0.71 of left and right,
    3 dB too much for a voice in both, and drops the channel it takes for the subwoofer, which in a meeting recorded
    with six microphones is a person.

    Raises:
        InputError: at any point, also after blocks were yielded; they are not to be used then.
        OSError: the file could not be read.
    """
    with _opened(file) as (container, stream):
        tally = _Tally(seams=Seams(file, container.format.name, is_alone=len(container.streams) == 1))
        promise = read_promise(file, container, stream)
        if promise and promise.seconds > longest_seconds:
            raise too_long(f"{promise.where} promises {promise.seconds / 3600:.1f} h", longest_seconds)
        yield from _blocks(_frames(container, stream, tally))
        _judge(tally, promise)


def too_long(found: str, longest_seconds: float) -> InputError:
    """What an input deserves that is longer than the configured limit."""
    return InputError(
        "TOO_LONG",
        f"{found}, and input.max_audio_hours is {longest_seconds / 3600:g}; cut it, or raise the limit and run with "
        "--retry-errors TOO_LONG",
    )


def decode_span(file: BinaryIO, span: Span) -> Iterator[Pcm]:
    """Decode a part of the first audio stream: the samples that `decode` gives, from the first to the last of the span.

    Where a container says exactly where its packets are, decoding begins shortly before the span; elsewhere what comes
    before is decoded and dropped. What follows the span is not looked at, so damage there is not found.

    Raises:
        InputError: as `decode`; TRUNCATED if the recording ends before the span does.
        OSError: the file could not be read.
    """
    if span.start_seconds >= _SEEK_FROM_SECONDS:
        with _opened(file) as (container, stream):
            position_seconds = _seek(container, stream, span.start_seconds - _SETTLE_SECONDS)
            if position_seconds is not None and position_seconds <= span.start_seconds:
                yield from _cut(container, stream, _Cutter(span, position_seconds))
                return
        file.seek(0)
    with _opened(file) as (container, stream):
        yield from _cut(container, stream, _Cutter(span, 0.0))


def estimate_seconds(file: BinaryIO) -> float | None:
    """The duration the headers name or let ffmpeg guess, without decoding; None where they do not."""
    try:
        with _opened(file) as (container, stream):
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = (container.duration or 0) / av.time_base
    except InputError:
        return None
    return seconds if seconds > 0 else None


def _cut(container: InputContainer, stream: AudioStream, cutter: "_Cutter") -> Iterator[Pcm]:
    tally = _Tally()
    yield from _blocks(cutter.cut(_frames(container, stream, tally)))
    _judge(tally, None)
    cutter.check()


def _seek(container: InputContainer, stream: AudioStream, seconds: float) -> float | None:
    """Go to the last packet that begins before `seconds`; -> where decoding goes on, or None if that is not known."""
    if container.format.name not in _SEEKABLE:
        return None
    try:
        first = _first_seconds(container, stream)
        target = int((first + seconds) / (stream.time_base or 1))
        container.seek(target, stream=stream)
        reached = _first_seconds(container, stream)
        container.seek(target, stream=stream)  # back to the packet that was decoded to learn where it is
    except (*_AV_ERRORS, StopIteration):
        return None
    return reached - first if reached >= first else None


def _first_seconds(container: InputContainer, stream: AudioStream) -> float:
    """The time of the next frame that holds sound, on the container's clock. Raises StopIteration if there is none."""
    frame = next(frame for frame in container.decode(stream) if frame.samples)
    if frame.pts is None or frame.time_base is None:
        raise ValueError("a frame without a time")
    return float(frame.pts * frame.time_base)


class _Cutter:
    """Lets through what lies in a span. Times are counted in samples, so that neighbours neither overlap nor miss."""

    def __init__(self, span: Span, position_seconds: float) -> None:
        """`position_seconds`: where in the recording the first frame is."""
        self._span = span
        self._begin_seconds = position_seconds  # of what is at the present rate
        self._num_samples = 0  # since then
        self._rate_hz = 0
        self._has_sound = False

    def cut(self, frames: Iterator[Pcm]) -> Iterator[Pcm]:
        for pcm in frames:
            if pcm.rate_hz != self._rate_hz:
                self._begin_seconds, self._num_samples, self._rate_hz = self._reached_seconds, 0, pcm.rate_hz
            start = max(0, self._index(self._span.start_seconds) - self._num_samples)
            end = len(pcm.samples)
            if self._span.end_seconds is not None:
                end = min(end, self._index(self._span.end_seconds) - self._num_samples)
            self._num_samples += len(pcm.samples)
            if start < end:
                self._has_sound = True
                yield Pcm(samples=pcm.samples[start:end], rate_hz=pcm.rate_hz, channels=pcm.channels)
            if end < len(pcm.samples):
                return

    def check(self) -> None:
        """Raise the InputError that a span deserves whose recording ended before it did."""
        start, end, reached = self._span.start_seconds, self._span.end_seconds, self._reached_seconds
        allowed_seconds = max(_MISSING_SECONDS, _MISSING_SHARE * ((end or start) - start))
        if self._has_sound and (end is None or end - reached <= allowed_seconds):
            return
        if end is not None and reached >= end:
            raise InputError(
                "EMPTY_AUDIO", f"asked for {end - start:.6f} s, which hold no sample; correct the duration"
            )
        until = "its end" if end is None else f"{end:.2f} s"
        raise InputError(
            "TRUNCATED",
            f"asked for {start:.2f} s to {until}, but the recording ends at {reached:.2f} s; correct offset and "
            "duration, or restore the recording",
        )

    @property
    def _reached_seconds(self) -> float:
        return self._begin_seconds + (self._num_samples / self._rate_hz if self._rate_hz else 0.0)

    def _index(self, seconds: float) -> int:
        """The sample at this time, counted from the beginning of what is at the present rate."""
        return math.floor(seconds * self._rate_hz + 0.5) - round(self._begin_seconds * self._rate_hz)


@contextmanager
def _opened(file: BinaryIO) -> Generator[tuple[InputContainer, AudioStream]]:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise InputError("EMPTY_AUDIO", "the file has 0 bytes; check how it was written or uploaded")
    try:
        # The name is hidden from ffmpeg: by its extension alone it would take an HTML page named .flac for sound.
        container = av.open(_Nameless(file), "r", metadata_errors="replace", options=_OPTIONS)
    except _AV_ERRORS as error:
        raise _not_opened(file, head, error) from None
    with container:
        yield container, _audio_stream(container, head)


class _Nameless:
    """A file without a name; PyAV reads and seeks through these methods."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.tell = file.tell
        self._seek = file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Damaged headers lead before the start or beyond all ends; ffmpeg wants an error code for that."""
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _not_opened(file: BinaryIO, head: bytes, error: Exception) -> InputError:
    if is_cut_mp4(file, head):
        return InputError("TRUNCATED", "the MP4 file ends before its index (moov); upload or record it again")
    if known := known_audio(head):
        return InputError("DECODE_FAILED", f"{known}, but its headers are damaged ({_reason(error)}); upload it again")
    return InputError("UNSUPPORTED_FORMAT", f"not audio: the file begins with {head[:16]!r}; expected {_SUPPORTED}")


def _audio_stream(container: InputContainer, head: bytes) -> AudioStream:
    if not container.streams.audio:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"no audio stream: the {container.format.name} file beginning with {head[:16]!r} holds {kinds}; "
            "remove it from the inputs, or replace it with the file that holds its sound",
        )
    stream = container.streams.audio[0]
    if not stream.codec_context:  # pyright: ignore[reportUnnecessaryComparison] (None where ffmpeg has no decoder)
        raise InputError("UNSUPPORTED_FORMAT", "no decoder for the audio codec in this file; convert it to flac or wav")
    stream.codec_context.thread_count = 1  # one load actor, one core; the actors are what runs in parallel
    if stream.codec_context.name == "flac":
        # Without this a frame whose checksum is wrong comes out as noise. Lossy codecs call too much an error with it.
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    return stream


def _blocks(frames: Iterator[Pcm]) -> Iterator[Pcm]:
    """Gather frames into blocks of one rate, and make sure that every sample is a number."""
    pending: list[Pcm] = []
    num_samples = 0
    for frame in frames:
        if pending and (num_samples >= _BLOCK_SAMPLES or frame.rate_hz != pending[0].rate_hz):
            yield _block(pending)
            pending, num_samples = [], 0
        pending.append(frame)
        num_samples += len(frame.samples)
    if pending:
        yield _block(pending)


def _block(frames: list[Pcm]) -> Pcm:
    samples = np.concatenate([frame.samples for frame in frames])
    if not np.isfinite(samples).all():
        raise InputError("DECODE_FAILED", "some samples are infinite or not a number; export the file again")
    return Pcm(samples=samples, rate_hz=frames[0].rate_hz, channels=frames[0].channels)


def _frames(container: InputContainer, stream: AudioStream, tally: _Tally) -> Iterator[Pcm]:
    to_mono = _ToMono()
    for packet in _packets(container, stream, tally):
        tally.num_packets += 1
        if tally.seams:
            tally.seams.follow(packet)
        try:
            decoded = [to_mono(frame) for frame in packet.decode() if frame.samples]
        except _AV_ERRORS as error:
            tally.num_bad_packets += 1
            tally.fault = _reason(error)
            continue
        for pcm in decoded:
            tally.decoded_seconds += len(pcm.samples) / pcm.rate_hz
            yield pcm
        _advance(tally, packet, stream)


def _packets(container: InputContainer, stream: AudioStream, tally: _Tally) -> "Iterator[Packet[AudioStream]]":
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except _AV_ERRORS as error:
            tally.is_broken = True
            tally.fault = _reason(error)
            return
        if packet is None:
            return
        yield packet


def _advance(tally: _Tally, packet: "Packet[AudioStream]", stream: AudioStream) -> None:
    if packet.pts is not None:
        end = packet.pts + (packet.duration or 0) - (stream.start_time or 0)
        tally.reached_seconds = max(tally.reached_seconds, float(end * packet.time_base))


class _ToMono:
    """Decoded frames to mono float32. A file may change rate and layout on the way, and swr must start anew then."""

    def __init__(self) -> None:
        self._key: tuple[str, str, int] | None = None
        self._packed = AudioResampler(format="flt")

    def __call__(self, frame: AudioFrame) -> Pcm:
        channels, rate_hz = frame.layout.nb_channels, frame.sample_rate
        if rate_hz not in _RATES_HZ or channels > _MAX_CHANNELS:
            raise InputError(
                "UNSUPPORTED_FORMAT",
                f"{channels} channels at {rate_hz} Hz; expected at most {_MAX_CHANNELS}, at {_RATES_HZ[0]} to "
                f"{_RATES_HZ[-1]} Hz; convert the file, or correct its header",
            )
        key = (frame.format.name, frame.layout.name, rate_hz)
        if key != self._key:
            self._key, self._packed = key, AudioResampler(format="flt")
        # Only the sample format changes here, so swr holds nothing back. Packed, never planar: PyAV reads beyond the
        # end of a planar frame of 8 channels and kills the process.
        packed = np.concatenate([one.to_ndarray().reshape(-1) for one in self._packed.resample(frame)])
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused with all that is not finite
            samples = packed.reshape(-1, channels).mean(axis=1, dtype=np.float32) if channels > 1 else packed
        return Pcm(samples=samples.astype(np.float32, copy=False), rate_hz=rate_hz, channels=channels)


def _judge(tally: _Tally, promise: Promise | None) -> None:
    """Raise the InputError that a stream deserves which was read to its end."""
    damage = f"{tally.num_bad_packets} of {tally.num_packets} packets could not be decoded ({tally.fault})"
    if tally.num_bad_packets > max(_ALLOWED_BAD_PACKETS, _ALLOWED_BAD_SHARE * tally.num_packets):
        raise InputError("DECODE_FAILED", f"{damage}; the file is damaged, upload it again")
    if promise:
        _keep(promise, tally)
    missing_seconds = tally.seams.missing_seconds() if tally.seams else 0.0
    if missing_seconds > max(_MISSING_SECONDS, _MISSING_SHARE * tally.decoded_seconds):
        raise InputError(
            "DECODE_FAILED",
            f"about {missing_seconds:.2f} s inside the file were not understood, {tally.decoded_seconds:.2f} s were; "
            "it is damaged, upload it again",
        )
    if tally.is_broken:
        raise InputError(
            "DECODE_FAILED", f"unreadable after {tally.decoded_seconds:.2f} s ({tally.fault}); upload the file again"
        )
    if tally.decoded_seconds == 0:
        if tally.num_bad_packets:
            raise InputError("DECODE_FAILED", f"{damage}; the file is damaged, upload it again")
        raise InputError("EMPTY_AUDIO", "the file holds an audio stream without any sample in it")


def _keep(promise: Promise, tally: _Tally) -> None:
    """Hold the decoded audio against what the header promised."""
    allowed_seconds = max(_MISSING_SECONDS, _MISSING_SHARE * promise.seconds)
    if promise.seconds - tally.decoded_seconds <= allowed_seconds:
        return
    found = f"{promise.where} promises {promise.seconds:.2f} s, {tally.decoded_seconds:.2f} s could be decoded"
    if promise.seconds - max(tally.decoded_seconds, tally.reached_seconds) > allowed_seconds:
        raise InputError("TRUNCATED", f"{found}, then the file ends; upload it again")
    if not promise.may_have_gaps:
        raise InputError("DECODE_FAILED", f"{found}, the rest is damaged; upload the file again")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, FFmpegError) else str(error)) or type(error).__name__
