"""Codes -> Tokens: streams come and go in the decoder's slots; every pass moves all of them.

`accept` and `step` are the whole of it. `run` drives them from an iterator; an actor drives them from its inbox.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from models.config import SpeechConfig
from models.decoder import Decoder
from models.slots import Harvest, Slots
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


# Of seated streams, before more is pulled in search of a stream for a free slot: 27 minutes of audio, 1.3 MB of codes.
_MAX_WAITING_FRAMES = 20_000


@dataclass(slots=True)
class _Stream:
    """A stream that has arrived, waiting for a slot or sitting in one."""

    source: Source
    to_skip: int
    held_back: int  # columns that must not be used before it is known that others follow
    pieces: deque[NDArray[np.int16]] = field(default_factory=deque)  # codes [K, T], oldest first
    num_waiting: int = 0  # columns in `pieces`
    facts: AudioFacts | None = None  # known when the last piece has come
    num_fed: int = 0  # positions given to the slot, the BOS step included
    # Flat arrays: of a day of audio, a million small objects would weigh a hundred times what they hold.
    ids: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))
    kept: list[NDArray[np.int16]] = field(default_factory=list)

    @property
    def num_emitted(self) -> int:
        """Tokens so far."""
        return len(self.ids)

    @property
    def num_feedable(self) -> int:
        """Columns that the slot may have now."""
        return max(0, self.num_waiting - self.held_back)

    @property
    def num_pending(self) -> int:
        """Positions that have come and are still to be stepped."""
        return self.num_feedable + self.num_fed - self.num_emitted

    @property
    def is_finished(self) -> bool:
        """Whether everything there will ever be has been emitted."""
        return self.facts is not None and self.num_pending == 0

    def put(self, codes_KT: NDArray[np.int16]) -> None:
        """Take columns in."""
        skip = min(self.to_skip, codes_KT.shape[1])
        self.to_skip -= skip
        if codes_KT.shape[1] > skip:
            self.pieces.append(codes_KT[:, skip:])
            self.num_waiting += codes_KT.shape[1] - skip

    def emit(self, harvest: Harvest) -> None:
        """Take tokens in."""
        self.ids.frombytes(harvest.ids.tobytes())
        self.logprobs.frombytes(harvest.logprobs.tobytes())

    def take(self, count: int) -> NDArray[np.int16]:
        """The next `count` columns, `[K, count]`."""
        self.num_waiting -= count
        self.num_fed += count
        taken: list[NDArray[np.int16]] = []
        while count:
            piece = self.pieces.popleft()
            if piece.shape[1] > count:
                self.pieces.appendleft(piece[:, count:])
            taken.append(piece[:, :count])
            count -= taken[-1].shape[1]
        return np.concatenate(taken, axis=1)


class GenerateStage:
    """Continuous batching over a fixed number of slots.

    Args:
        decoder: the weights.
        speech: the checkpoint's special ids.
        num_slots: streams per pass.
        lookahead: positions of a stream per pass at most; changes speed, never a token.
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
        lookahead: int = 1,
        alignment: Alignment = "all-frames",
        temperature: float = 0.0,
        seed: int = 0,
        keep_codes: bool = False,
    ) -> None:
        like_transformers = alignment == "first-frame-twice"
        self._slots = Slots(
            decoder,
            num_slots,
            lookahead=lookahead,
            padding_id=speech.padding_id,
            bos_row=speech.hf_bos_row if like_transformers else None,
            zero_logit=like_transformers,
            temperature=temperature,
            top_k=speech.top_k,
        )
        self._schedule = _SCHEDULES[alignment]
        self._seed, self._keep_codes = seed, keep_codes
        self._device = decoder.device
        # The BOS step takes the place of a column whose codes are not looked at.
        self._bos_column_K1 = np.zeros((decoder.config.num_codebooks, 1), dtype=np.int16)
        self._streams: dict[str, _Stream] = {}
        self._waiting: deque[str] = deque()
        self._seated: list[str | None] = [None] * num_slots
        self.num_slots = num_slots
        self.passes = 0
        self.slot_passes = 0  # slots that moved, over all passes; divided by passes and slots: the occupancy
        self.positions = 0  # tokens emitted; divided by slot_passes: what look-ahead gains

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
        if any(stream.num_fed and self._is_dry(stream) for stream in streams):
            return None
        return sum(stream.num_pending for stream in streams)

    def wants_input(self) -> bool:
        """Whether more input would be put to use: a seated stream has run dry, or there may be one for a free slot."""
        seated = [self._streams[key] for key in self._seated if key is not None]
        if any(self._is_dry(stream) for stream in seated):
            return True
        # The next stream may come behind hours of one that is seated already: not at the price of keeping them all.
        is_light = sum(stream.num_waiting for stream in seated) < _MAX_WAITING_FRAMES
        return is_light and not self._waiting and None in self._seated

    def can_step(self) -> bool:
        """Whether a pass would move at least one stream."""
        if self._waiting and None in self._seated:
            return True
        return any(key is not None and not self._is_dry(self._streams[key]) for key in self._seated)

    def accept(self, message: Codes | Failure) -> Iterator[Tokens | Failure]:
        """Take in one message; a failure ends its stream and is passed on."""
        if isinstance(message, Failure):
            self._forget(message.source.id)
            yield message
            return
        stream = self._streams.get(message.source.id) or self._new_stream(message.source)
        stream.put(message.codes)
        if self._keep_codes:
            stream.kept.append(message.codes)
        if message.is_last:
            stream.facts = message.facts or AudioFacts()
            # The last columns stay where they are, unread. What precedes them may be used from now on.
            stream.num_waiting = max(stream.num_waiting - stream.held_back, 1 - stream.num_fed)
            stream.held_back = 0
            if stream.is_finished:  # the last of it was stepped before its end was known
                yield self._finish(stream)

    def step(self) -> Iterator[Tokens | Failure]:
        """One pass over the slots; -> the streams that it finished."""
        self._seat()
        seated = [(slot, self._streams[key]) for slot, key in enumerate(self._seated) if key is not None]
        for slot, stream in seated:
            self._feed(slot, stream)
        active = [(slot, stream) for slot, stream in seated if stream.num_fed > stream.num_emitted]
        if not active:
            return
        self._slots.step()
        harvests = self._slots.harvest([slot for slot, _ in active])
        self.passes += 1
        self.slot_passes += len(active)
        self.positions += sum(len(harvest.ids) for harvest in harvests)
        for (_, stream), harvest in zip(active, harvests, strict=True):
            stream.emit(harvest)
            if stream.is_finished:
                yield self._finish(stream)

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

    def _new_stream(self, source: Source) -> _Stream:
        schedule = self._schedule
        stream = _Stream(source=source, to_skip=0, held_back=schedule.held_back)
        stream.put(self._bos_column_K1)
        stream.to_skip = schedule.skipped
        self._streams[source.id] = stream
        self._waiting.append(source.id)
        return stream

    def _is_dry(self, stream: _Stream) -> bool:
        """Whether the stream cannot move before its next piece comes."""
        return stream.facts is None and stream.num_pending == 0

    def _seat(self) -> None:
        for slot, key in enumerate(self._seated):
            if key is None and self._waiting:
                key = self._waiting.popleft()
                self._seated[slot] = key
                self._slots.start(slot, seed=_stream_seed(self._seed, key))

    def _feed(self, slot: int, stream: _Stream) -> None:
        """Write audio ahead, many frames at a time: it is embedded in one call."""
        ahead = stream.num_fed - stream.num_emitted
        count = min(stream.num_feedable, self._slots.room(slot))
        if count and ahead < 2 * self._slots.lookahead:
            codes_KT = torch.from_numpy(stream.take(count)).to(self._device)
            self._slots.feed(slot, codes_KT)

    def _finish(self, stream: _Stream) -> Tokens:
        self._forget(stream.source.id)
        assert stream.facts is not None
        return Tokens(
            source=stream.source,
            facts=stream.facts,
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
