"""Source -> Waveform pieces: fetch, decode, resample, pad. CPU only.

Everything streams: of a three-hour file, one block of samples and one piece are in memory at a time.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soxr
from numpy.typing import NDArray

from pipeline.audio_bytes import AudioFiles
from pipeline.decode_audio import Pcm, Span, decode, decode_span, estimate_seconds, too_long
from pipeline.errors import InputError
from pipeline.failpoints import failpoint
from pipeline.messages import AudioFacts, Failure, Segment, Source, Waveform
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]  # [S]
TAIL_MARGIN_SECONDS = 1.0  # what transformers' feature extractor and moshi's run_inference add to the delay


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """What the model hears around a file: the one place where prefix and tail are decided.

    Args:
        prefix_seconds: silence before the audio, as the checkpoint was trained with.
        delay_seconds: how long after a word its text comes; the tail must last longer, or the last words are lost.
        repeat_first_frame: the first frame of the padded audio comes twice, as in transformers with
            `audio_window_size=1`.
    """

    prefix_seconds: float
    delay_seconds: float
    sampling_rate_hz: int = 24_000
    samples_per_frame: int = 1_920
    repeat_first_frame: bool = False

    @property
    def prefix_samples(self) -> int:
        return int(self.prefix_seconds * self.sampling_rate_hz)

    @property
    def tail_samples(self) -> int:
        return int((self.delay_seconds + TAIL_MARGIN_SECONDS) * self.sampling_rate_hz)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a stream of `num_samples`, a repeated one not counted. Both references drop a last partial one."""
        return (self.prefix_samples + num_samples + self.tail_samples) // self.samples_per_frame

    def apply(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """The padded audio, in blocks of any size."""
        padded = self._surround(blocks)
        return _repeat_head(padded, self.samples_per_frame) if self.repeat_first_frame else padded

    def _surround(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        yield np.zeros(self.prefix_samples, np.float32)
        yield from blocks
        yield np.zeros(self.tail_samples, np.float32)


class LoadStage:
    """Turns every source into the pieces of its padded waveform, or into a Failure.

    Args:
        piece_seconds: the longest piece; bounds memory, changes no sample.
        longest_seconds: of one input; what is longer is a Failure.
    """

    def __init__(
        self, storage: Storage, padding: Padding, *, piece_seconds: float = 60.0, longest_seconds: float = math.inf
    ) -> None:
        self._storage = storage
        self._padding = padding
        self._longest_seconds = longest_seconds
        frames_per_piece = int(piece_seconds * padding.sampling_rate_hz) // padding.samples_per_frame
        self._piece_samples = max(1, frames_per_piece) * padding.samples_per_frame

    def run(self, inbox: Iterable[Source | Failure]) -> Iterator[Waveform | Failure]:
        """One input at a time; the next is not touched before the last piece of this one was taken."""
        with AudioFiles(self._storage) as files:
            for message in inbox:
                if isinstance(message, Failure):
                    yield message
                elif message.fault is not None:
                    yield _failure(message, "BAD_CONTAINER", message.fault, _Heard())
                else:
                    yield from self._stream(message, files)

    def _stream(self, source: Source, files: AudioFiles) -> Iterator[Waveform | Failure]:
        heard = _Heard()
        failpoint("load.before-open")
        try:
            with files.fetched(source) as (file, digest):
                heard.content_sha256 = digest
                for samples, is_last in self._pieces(self._decoded(file, source), heard):
                    facts = heard.facts() if is_last else None
                    failpoint("load.mid-stream")
                    yield Waveform(source=source, samples=samples, is_last=is_last, facts=facts)
        except InputError as error:
            yield _failure(source, error.code, error.message, heard)
        except (FileNotFoundError, NotADirectoryError):
            message = f"{source.file_uri} does not exist (any more); restore it, or take it out of the inputs"
            yield _failure(source, "NOT_FOUND", message, heard)
        except OSError as error:
            message = f"could not read {source.uri}: {error}; check permissions and network, then run again"
            yield _failure(source, "FETCH_FAILED", message, heard)
        except MemoryError:
            message = "decoding it wants more memory than stages.load.memory_gib allows; convert it, or raise the limit"
            yield _failure(source, "DECODE_FAILED", message, heard)
        except Exception as error:
            logger.exception("load failed on %s", source.uri)
            message = f"{type(error).__name__} while decoding: {error}; if it plays elsewhere, please report it"
            yield _failure(source, "DECODE_FAILED", message, heard)

    def _pieces(self, blocks: Iterator[Pcm], heard: "_Heard") -> Iterator[tuple[Samples, bool]]:
        heard_blocks = heard.listen(blocks, shortest_seconds=self._frame_seconds, longest_seconds=self._longest_seconds)
        resampled = _resample(heard_blocks, to_hz=self._padding.sampling_rate_hz)
        return cut(
            self._padding.apply(resampled),
            piece_samples=self._piece_samples,
            samples_per_frame=self._padding.samples_per_frame,
        )

    def _decoded(self, file: BinaryIO, source: Source) -> Iterator[Pcm]:
        place = source.place
        if not isinstance(place, Segment):
            return decode(file, longest_seconds=self._longest_seconds)
        length = place.duration_seconds
        end_seconds = None if length is None else place.start_seconds + length
        return decode_span(file, Span(start_seconds=place.start_seconds, end_seconds=end_seconds))

    @property
    def _frame_seconds(self) -> float:
        return self._padding.samples_per_frame / self._padding.sampling_rate_hz


def probe_seconds(storage: Storage, sources: Sequence[Source]) -> list[float | None]:
    """Durations in seconds as headers have them, without decoding; None where they do not say or cannot be read.

    Sources of the same file, one after the other, cost one opening of it.
    """
    with AudioFiles(storage) as files:
        return [_probe(source, files) for source in sources]


def _probe(source: Source, files: AudioFiles) -> float | None:
    try:
        with files.peeked(source) as file:
            seconds = estimate_seconds(file)
    except (OSError, InputError):
        return None
    if seconds is not None and isinstance(source.place, Segment):
        return max(0.0, seconds - source.place.start_seconds)
    return seconds


def cut(blocks: Iterable[Samples], *, piece_samples: int, samples_per_frame: int) -> Iterator[tuple[Samples, bool]]:
    """Regroup blocks into pieces of whole frames, at most `piece_samples` each, and say which is the last.

    A partial frame at the end is dropped. A piece goes out only when a whole frame for the next is there, so the last
    is never empty.
    """
    pending: list[Samples] = []
    num_pending = 0
    for block in blocks:
        pending.append(block)
        num_pending += len(block)
        if num_pending < piece_samples + samples_per_frame:
            continue
        rest = np.concatenate(pending)
        while len(rest) >= piece_samples + samples_per_frame:
            yield rest[:piece_samples].copy(), False
            rest = rest[piece_samples:]
        pending, num_pending = [rest.copy()], len(rest)
    rest = np.concatenate(pending) if pending else np.zeros(0, np.float32)
    yield rest[: len(rest) // samples_per_frame * samples_per_frame], True


class _Heard:
    """What is known of a file so far."""

    def __init__(self) -> None:
        self.content_sha256: str | None = None
        self._num_samples: Counter[int] = Counter()  # by rate; adding up seconds instead would add up rounding too
        self._rate_hz: int | None = None
        self._channels: int | None = None

    def listen(self, blocks: Iterable[Pcm], *, shortest_seconds: float, longest_seconds: float) -> Iterator[Pcm]:
        """Pass the blocks on and remember their facts.

        Raises:
            InputError: they go on beyond `longest_seconds`; or, at the end, were shorter than `shortest_seconds`.
        """
        for block in blocks:
            self._rate_hz = self._rate_hz or block.rate_hz
            self._channels = self._channels or block.channels
            self._num_samples[block.rate_hz] += len(block.samples)
            if (self._seconds or 0.0) > longest_seconds:
                raise too_long(f"after {longest_seconds / 3600:g} h it still goes on", longest_seconds)
            yield block
        seconds = self._seconds
        if seconds is not None and seconds < shortest_seconds:
            raise InputError(
                "EMPTY_AUDIO",
                f"{self._num_samples.total()} samples at {self._rate_hz} Hz, {seconds * 1000:.1f} ms; "
                f"less than one frame ({shortest_seconds * 1000:.0f} ms) holds no word; take it out of the inputs",
            )

    @property
    def _seconds(self) -> float | None:
        return sum(count / rate_hz for rate_hz, count in self._num_samples.items()) if self._num_samples else None

    def facts(self) -> AudioFacts:
        return AudioFacts(
            content_sha256=self.content_sha256,
            duration_seconds=self._seconds,
            sampling_rate_hz=self._rate_hz,
            channels=self._channels,
        )


def _resample(blocks: Iterable[Pcm], *, to_hz: int) -> Iterator[Samples]:
    """Mono blocks of any rate to `to_hz`, where S samples become S * to_hz / rate, rounded; those at it pass untouched.

    soxr HQ: no alias above -140 dB, at 2,000 times real time and more; swr's default leaves -16 dB.
    """
    stream: soxr.ResampleStream | None = None
    rate_hz = to_hz
    for block in blocks:
        if block.rate_hz != rate_hz:
            if stream:
                yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
            rate_hz = block.rate_hz
            stream = None if rate_hz == to_hz else soxr.ResampleStream(rate_hz, to_hz, 1, "float32", "HQ")
        yield stream.resample_chunk(block.samples) if stream else block.samples
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _repeat_head(blocks: Iterator[Samples], num_samples: int) -> Iterator[Samples]:
    """The blocks, with the first `num_samples` of all of them coming twice."""
    head = np.zeros(0, np.float32)
    for block in blocks:
        head = np.concatenate([head, block])
        if len(head) >= num_samples:
            break
    yield head[:num_samples]
    yield head
    yield from blocks


def _failure(source: Source, code: str, message: str, heard: _Heard) -> Failure:
    return Failure(source=source, stage="load", code=code, message=message, facts=heard.facts())
