"""Codes -> Tokens: streams come and go in the decoder's slots; every pass moves all of them one frame.

`accept` and `step` are the whole of it. `run` drives them from an iterator; an actor drives them from its inbox.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from models.config import SpeechConfig
from models.decoder import Decoder
from models.slots import Slots
from pipeline.config import Alignment
from pipeline.messages import AudioFacts, Codes, Failure, Source, Tokens


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Which of a stream's code columns follow the BOS step."""

    skipped: int  # at the front
    held_back: int  # at the end


# F is the number of whole frames of the padded audio.
_SCHEDULES: dict[Alignment, _Schedule] = {
    "all-frames": _Schedule(0, 0),  # BOS, f0 .. f(F-1): F + 1 tokens
    "bos-replaces-first": _Schedule(1, 0),  # BOS, f1 .. f(F-1): F tokens
    # The first frame was encoded twice, so there are F + 1 columns: BOS, f0, f0', f1 .. f(F-3): F tokens.
    "first-frame-twice": _Schedule(0, 2),
}


@dataclass(slots=True)
class _Stream:
    """A stream that has arrived, waiting for a slot or sitting in one."""

    source: Source
    pieces: deque[NDArray[np.int16]] = field(default_factory=deque)  # codes [T, K], oldest first
    cursor: int = 0  # frames of the first piece already stepped
    num_pending: int = 0  # frames that have come and are still to be stepped
    to_skip: int = 0
    facts: AudioFacts | None = None  # known when the last piece has come
    begun: bool = False  # the BOS step is done
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[NDArray[np.int16]] = field(default_factory=list)

    def next_column(self) -> NDArray[np.int16]:
        """The codes `[K]` of the next frame."""
        column = self.pieces[0][self.cursor]
        self.cursor += 1
        self.num_pending -= 1
        if self.cursor == len(self.pieces[0]):
            self.pieces.popleft()
            self.cursor = 0
        return column


class GenerateStage:
    """Continuous batching over a fixed number of slots.

    Args:
        decoder: the weights.
        speech: the checkpoint's special ids.
        num_slots: streams per pass.
        alignment: which frames follow BOS; see `_SCHEDULES`.
        temperature: 0 for greedy.
        seed: with a temperature, streams are sampled alike for the same seed and source.
        keep_codes: hand the codes on with the tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        speech: SpeechConfig,
        *,
        num_slots: int,
        alignment: Alignment = "all-frames",
        temperature: float = 0.0,
        seed: int = 0,
        keep_codes: bool = False,
    ) -> None:
        like_transformers = alignment == "first-frame-twice"
        self._slots = Slots(
            decoder,
            num_slots,
            bos_row=speech.hf_bos_row if like_transformers else None,
            zero_logit=like_transformers,
            temperature=temperature,
            top_k=speech.top_k,
        )
        self._schedule = _SCHEDULES[alignment]
        self._seed, self._keep_codes = seed, keep_codes
        self._device = decoder.device
        self._streams: dict[str, _Stream] = {}
        self._waiting: deque[str] = deque()
        self._seated: list[str | None] = [None] * num_slots
        self._codes_BK = np.zeros((num_slots, decoder.config.num_codebooks), dtype=np.int16)
        self.num_slots = num_slots
        self.passes = 0
        self.slot_steps = 0  # slots moved, over all passes; divided by passes and slots: the occupancy

    @property
    def num_waiting(self) -> int:
        """Streams that have arrived and have no slot yet."""
        return len(self._waiting)

    @property
    def num_open(self) -> int:
        """Streams that have arrived and are not finished."""
        return len(self._streams)

    def num_pending_frames(self, source_ids: Iterable[str]) -> int | None:
        """Frames of these streams still to be stepped; None if one of them has a slot and waits for its next piece."""
        found = (self._streams.get(key) for key in source_ids)
        streams = [stream for stream in found if stream is not None]
        if any(stream.begun and self._is_dry(stream) for stream in streams):
            return None
        return sum(stream.num_pending for stream in streams)

    def wants_input(self) -> bool:
        """Whether more input would be put to use at once: a slot is free, or a seated stream has run dry."""
        if not self._waiting and None in self._seated:
            return True
        return any(self._is_dry(self._streams[key]) for key in self._seated if key is not None)

    def can_step(self) -> bool:
        """Whether a pass would move at least one stream."""
        return bool(self._waiting) or any(
            key is not None and not self._is_dry(self._streams[key]) for key in self._seated
        )

    def accept(self, message: Codes | Failure) -> Iterator[Tokens | Failure]:
        """Take in one message; a failure ends its stream and is passed on."""
        if isinstance(message, Failure):
            self._forget(message.source.id)
            yield message
            return
        stream = self._streams.get(message.source.id)
        if stream is None:
            stream = _Stream(source=message.source, to_skip=self._schedule.skipped)
            self._streams[message.source.id] = stream
            self._waiting.append(message.source.id)
        self._take_codes(stream, message.codes)
        if message.is_last:
            stream.facts = message.facts or AudioFacts()
            stream.num_pending -= self._schedule.held_back  # the last columns stay where they are, unread
            if stream.begun and stream.num_pending <= 0:  # the last of it was stepped before its end was known
                self._forget(message.source.id)
                yield self._tokens(stream, stream.facts)

    def step(self) -> Iterator[Tokens | Failure]:
        """One pass over the slots; -> the streams that it finished."""
        self._seat()
        active = [key is not None and not self._is_dry(self._streams[key]) for key in self._seated]
        if not any(active):
            return
        for slot, key in enumerate(self._seated):
            if active[slot] and key is not None and self._streams[key].begun:
                self._codes_BK[slot] = self._streams[key].next_column()
        ids_B, logprobs_B = self._slots.step(
            torch.from_numpy(self._codes_BK).to(self._device), torch.tensor(active, device=self._device)
        )
        self.passes += 1
        self.slot_steps += sum(active)
        yield from self._collect(active, ids_B.tolist(), logprobs_B.tolist())

    def run(self, inbox: Iterable[Codes | Failure]) -> Iterator[Tokens | Failure]:
        """Pull from `inbox` whenever a slot would otherwise stand empty, until everything is finished."""
        messages, exhausted = iter(inbox), False
        while not exhausted or self._streams:
            while not exhausted and self.wants_input():
                message = next(messages, None)
                if message is None:
                    exhausted = True
                else:
                    yield from self.accept(message)
            yield from self.step()

    def _take_codes(self, stream: _Stream, codes_KT: NDArray[np.int16]) -> None:
        if self._keep_codes:
            stream.kept.append(codes_KT)
        skip = min(stream.to_skip, codes_KT.shape[1])
        stream.to_skip -= skip
        if codes_KT.shape[1] > skip:
            stream.pieces.append(np.ascontiguousarray(codes_KT.T[skip:]))
            stream.num_pending += codes_KT.shape[1] - skip

    def _is_dry(self, stream: _Stream) -> bool:
        """Whether the stream cannot move before its next piece comes."""
        if not stream.begun:
            return False
        if stream.facts is not None:
            return False  # complete: a stream with nothing left is removed, never left sitting
        return stream.num_pending <= self._schedule.held_back

    def _seat(self) -> None:
        for slot, key in enumerate(self._seated):
            if key is None and self._waiting:
                key = self._waiting.popleft()
                self._seated[slot] = key
                self._slots.start(slot, seed=_stream_seed(self._seed, key))

    def _collect(self, active: list[bool], ids: list[int], logprobs: list[float]) -> Iterator[Tokens]:
        for slot, key in enumerate(self._seated):
            if not active[slot] or key is None:
                continue
            stream = self._streams[key]
            stream.begun = True
            stream.ids.append(ids[slot])
            stream.logprobs.append(logprobs[slot])
            if stream.facts is not None and stream.num_pending <= 0:
                self._forget(key)
                yield self._tokens(stream, stream.facts)

    def _tokens(self, stream: _Stream, facts: AudioFacts) -> Tokens:
        return Tokens(
            source=stream.source,
            facts=facts,
            ids=np.asarray(stream.ids, dtype=np.int32),
            logprobs=np.asarray(stream.logprobs, dtype=np.float32),
            codes=np.concatenate(stream.kept, axis=1) if self._keep_codes else None,
        )

    def _forget(self, key: str) -> None:
        if self._streams.pop(key, None) is None:
            return
        if key in self._waiting:
            self._waiting.remove(key)
        self._seated = [None if seated == key else seated for seated in self._seated]


def _stream_seed(seed: int, source_id: str) -> int:
    """63 bits that depend on the run's seed and the source alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source_id}".encode()).digest()[:8], "big") >> 1
