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
class TarMember:
    """The place of an input that is a file in an uncompressed tar; its bytes are read by range, nothing is scanned."""

    file_uri: str  # of the tar
    file_version: str  # as it was planned: in another version the bytes may be anywhere
    name: str
    offset_bytes: int  # where its bytes begin; `Source.size_bytes` says how many they are


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetRow:
    """The place of an input that is a row of a Parquet file: a cell that holds the bytes, or names the file."""

    file_uri: str  # of the Parquet file
    file_version: str  # as it was planned: in another version the row may be another recording
    column: str
    row: int  # from 0, over all row groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The place of an input that is a part of a recording."""

    file_uri: str  # of the recording
    start_seconds: float
    duration_seconds: float | None  # None: to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input. `id` is stable: the same input has the same id in any run.

    `uri` is for people and for the row; it may be ambiguous (a file name may hold a `#`). What to open is `file_uri`.
    """

    id: str
    uri: str  # of the file; `file#member`, `file#row` or `file#t=START,END` where `place` says more
    size_bytes: int | None = None  # of the encoded audio
    place: TarMember | ParquetRow | Segment | None = None  # None: the whole file at `uri`
    fault: str | None = None  # why there is nothing to open, where planning found that out: such an input gets its row

    @property
    def file_uri(self) -> str:
        """The file that has to be opened."""
        return self.uri if self.place is None else self.place.file_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """A shard as the plan lists it: enough to order, count and name it. Its sources are read when its turn comes."""

    id: str
    num_inputs: int
    estimated_seconds: float  # of audio, all inputs together
    longest_seconds: float  # of one input
    manifest_uri: str  # which manifest holds its sources
    first_row: int  # in that manifest; the others follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A fixed group of sources: the unit of restart, and one output file. `id` follows from the ids of its sources."""

    id: str
    sources: tuple[Source, ...]  # longest first, or in the order of the file they share; so are the rows of the part
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
