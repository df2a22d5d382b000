"""Synthetic work for measuring: seeded lengths as they occur, and noise of those lengths.

*Credited* seconds are seconds of speech: prefix and tail, which every stream is given, count for nothing. *Step*
seconds are all the frames that the decoder has to be stepped through.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.config import MimiConfig, SpeechConfig
from pipeline.messages import AudioFacts, Source, Waveform

MIXES = ("2.5s", "librispeech", "30s", "1h")

_FIXED_SECONDS = {"2.5s": 2.5, "30s": 30.0, "1h": 3600.0}
# LibriSpeech test-clean: 7.4 s on average, 1.3 to 35 s; a lognormal of this spread is close to it.
_MEAN_SECONDS, _SPREAD, _SHORTEST_SECONDS, _LONGEST_SECONDS = 7.4, 0.65, 1.3, 35.0
_TAIL_MARGIN_SECONDS = 1.0  # as `pipeline/load.py` adds to the delay; not imported, it brings libraries for audio


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Clips by their lengths."""

    mix: str
    speech_seconds: tuple[float, ...]
    padding_seconds: float  # prefix, delay and margin of every clip
    frame_rate_hz: float

    @property
    def credited_seconds(self) -> float:
        """Seconds of speech."""
        return sum(self.speech_seconds)

    @property
    def step_seconds(self) -> float:
        """Seconds of frames, padding included."""
        return sum(self.num_frames) / self.frame_rate_hz

    def first(self, step_seconds: float) -> "Workload":
        """The first clips, as many as last so long with their padding, but one at least."""
        ends = np.cumsum(self.num_frames) / self.frame_rate_hz
        return replace(self, speech_seconds=self.speech_seconds[: max(1, int((ends <= step_seconds).sum()))])

    @property
    def num_frames(self) -> tuple[int, ...]:
        """Whole frames of each padded clip."""
        # A hair is added because 2.5 s are 31.25 frames, but 0.1 + 0.2 s are not quite what they should be.
        return tuple(
            int((seconds + self.padding_seconds) * self.frame_rate_hz + 1e-6) for seconds in self.speech_seconds
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clips:
    """Clips as the decoder gets them."""

    name: str
    codes: tuple[NDArray[np.int16], ...]  # [K, T] each
    credited_seconds: float
    frame_rate_hz: float

    @property
    def step_seconds(self) -> float:
        """Seconds of frames, padding included."""
        return sum(clip.shape[1] for clip in self.codes) / self.frame_rate_hz


def make_workload(
    mix: str,
    *,
    num_clips: int,
    speech: SpeechConfig,
    frame_rate_hz: float,
    longest_seconds: float | None = None,
    seed: int = 0,
) -> Workload:
    """So many clips of a mix.

    Args:
        longest_seconds: clips are cut to this, where an hour is more than one wants to wait for.
    """
    if mix in _FIXED_SECONDS:
        lengths = np.full(num_clips, _FIXED_SECONDS[mix])
    else:
        mean_of_log = math.log(_MEAN_SECONDS) - _SPREAD**2 / 2
        lengths = np.random.default_rng(seed).lognormal(mean_of_log, _SPREAD, num_clips)
        lengths = lengths.clip(_SHORTEST_SECONDS, _LONGEST_SECONDS).round(2)
    if longest_seconds is not None:
        lengths = lengths.clip(max=longest_seconds)
    return Workload(
        mix=mix,
        speech_seconds=tuple(lengths.tolist()),
        padding_seconds=speech.prefix_seconds + speech.delay_seconds + _TAIL_MARGIN_SECONDS,
        frame_rate_hz=frame_rate_hz,
    )


def random_clips(workload: Workload, *, mimi: MimiConfig, seed: int = 0) -> Clips:
    """Random codes of the workload's lengths."""
    rng, books = np.random.default_rng(seed), mimi.num_codebooks
    codes = [rng.integers(mimi.codebook_size, size=(books, num), dtype=np.int16) for num in workload.num_frames]
    return Clips(
        name=workload.mix,
        codes=tuple(codes),
        credited_seconds=workload.credited_seconds,
        frame_rate_hz=mimi.frame_rate_hz,
    )


def noise(workload: Workload, *, mimi: MimiConfig, prefix_seconds: float, seed: int = 0) -> Iterator[Waveform]:
    """Every clip as one piece of padded audio: noise whose loudness wanders, between silences."""
    prefix = int(prefix_seconds * mimi.sample_rate_hz)
    for index, (seconds, num_frames) in enumerate(zip(workload.speech_seconds, workload.num_frames, strict=True)):
        rng = np.random.default_rng((seed, index))
        num_samples = int(seconds * mimi.sample_rate_hz)
        loudness = 0.1 + 0.08 * np.sin(np.arange(num_samples) / (3000 + 500 * (index % 7)))
        samples = np.zeros(num_frames * mimi.frame_samples, np.float32)
        samples[prefix : prefix + num_samples] = rng.standard_normal(num_samples, np.float32) * loudness
        name = f"{workload.mix}-{index}"
        yield Waveform(
            source=Source(id=name, uri=f"memory://{name}"),
            samples=samples,
            is_last=True,
            facts=AudioFacts(duration_seconds=seconds, sampling_rate_hz=mimi.sample_rate_hz, channels=1),
        )
