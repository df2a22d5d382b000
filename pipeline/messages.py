"""Every object that crosses a stage boundary. Learn the system from this file.

    Source -> load -> Waveform -> encode -> Codes -> generate -> Tokens -> align -> Transcript -> write -> row
                 \\______________ Failure: walks the same corridor to the end and gets its row ______________/

A stream (one audio file's passage through the model) travels as an ordered run of *pieces* as far as `generate`:
`Waveform` and `Codes` are pieces, the one with `is_last` closes the stream and brings the `AudioFacts`. Pieces of one
stream are never reordered; pieces of different streams may interleave. From `generate` on, one message is one stream.
A `Failure` may come at any point, closes its stream, and nothing of that stream follows it.

One hour of audio weighs 346 MB as samples, 2.9 MB as codes, 0.2 MB as tokens: `load -> encode` stays on one machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input. `id` is stable: the same input has the same id in any run."""

    id: str
    uri: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A fixed group of sources: the unit of restart, and one output file. `id` follows from the ids of its sources."""

    id: str
    sources: tuple[Source, ...]  # longest first; the rows of the part are in this order
    estimated_seconds: float  # of audio


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFacts:
    """What decoding learnt about an input; a field is None where decoding did not get that far."""

    content_sha256: str | None = None
    duration_seconds: float | None = None
    sampling_rate_hz: int | None = None
    channels: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waveform:
    """A piece of one stream's PCM: mono float32 `[S]` at the model's rate, prefix and tail padding included.

    Every piece but the last holds whole frames.
    """

    source: Source
    samples: NDArray[np.float32]
    is_last: bool
    facts: AudioFacts | None = None  # on the last piece


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """A piece of one stream's Mimi codes: int16 `[K, T]`, K codebooks, T frames. The last piece may hold no frame."""

    source: Source
    codes: NDArray[np.int16]
    is_last: bool
    facts: AudioFacts | None = None  # on the last piece


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """What the decoder emitted for one stream: one text token per step, in order."""

    source: Source
    facts: AudioFacts
    ids: NDArray[np.int32]  # [N]
    logprobs: NDArray[np.float32]  # [N], natural log of the probability of each id
    codes: NDArray[np.int16] | None = None  # [K, T], kept only when the output wants them


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A word and its place, in seconds from the start of the file (prefix and delay already taken off)."""

    text: str
    start_seconds: float
    end_seconds: float
    confidence: float  # geometric mean of the probabilities of its pieces, in [0, 1], four digits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transcript:
    """What was heard in one stream."""

    source: Source
    facts: AudioFacts
    text: str
    words: tuple[Word, ...]
    avg_logprob: float | None  # mean over the tokens that are not padding; None where there are none
    ids: NDArray[np.int32]
    codes: NDArray[np.int16] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An input that could not be transcribed: data, not an incident."""

    source: Source
    stage: str  # load, encode, generate, align or write
    code: str  # e.g. DECODE_FAILED; the list is in errors.py
    message: str  # what was found, what was expected, what to do
    facts: AudioFacts = AudioFacts()
