"""Codes -> Tokens: streams come and go in the decoder's slots; every pass moves all of them.

`accept` and `step` are the whole of it. `run` drives them from an iterator; an actor drives them from its inbox.

There is no end-of-stream token: a stream is over when its audio is. So the host knows beforehand for how many passes no
slot can run out, starts those as one bundle, and reads the tokens of the bundle before while this one runs. Without
look-ahead it also knows when a stream will be over, and gives its slot away before it has seen the last tokens. With
look-ahead it learns that one bundle late, and the slot stands still for that long: towards the end of a stream a bundle
is one pass, so a pass or two per stream.
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
from models.slots import Harvest, Report, Slots
from pipeline.config import Alignment
from pipeline.failpoints import failpoint
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


# On a GPU; on a CPU a bundle is one pass, and read at once, since the host is what would do two things at a time.
_BUNDLE_PASSES = 32
# While a slot stands empty: a stream that arrives should not have to wait for long.
_SHORT_BUNDLE_PASSES = 4

# Of seated streams, before more is pulled in search of a stream for a free slot: 27 minutes of audio, 1.3 MB of codes.
_MAX_WAITING_FRAMES = 20_000


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream that has arrived, waiting for a slot or sitting in one."""

    source: Source
    to_skip: int
    held_back: int  # columns that must not be used before it is known that others follow
    pieces: deque[NDArray[np.int16]] = field(default_factory=deque)  # codes [K, T], oldest first
    num_waiting: int = 0  # columns in `pieces`
    facts: AudioFacts | None = None  # known when the last piece has come
    slot: int | None = None  # as long as it needs one
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bundle:
    """Passes that were started and not yet read."""

    report: Report
    seated: tuple[_Stream | None, ...]


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
        bundle: passes started at once at most; 1: each is read before the next is started. Changes no token. None: what
            suits the decoder's device.
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
        bundle: int | None = None,
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
        self._bundle = bundle or (_BUNDLE_PASSES if decoder.device.type == "cuda" else 1)
        # Audio ahead of the passes, below which a slot is fed, and below which more of its stream is asked for.
        self._low_frames = 2 * lookahead if self._bundle == 1 else self._slots.ring_frames // 2
        self._scarce_frames = 1 if self._bundle == 1 else self._bundle * lookahead
        self._started: deque[_Bundle] = deque()
        # The BOS step takes the place of a column whose codes are not looked at.
        self._bos_column_K1 = np.zeros((decoder.config.num_codebooks, 1), dtype=np.int16)
        self._streams: dict[str, _Stream] = {}
        self._waiting: deque[str] = deque()
        self._seated: list[_Stream | None] = [None] * num_slots
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
        """Whether more input would be put to use: a seated stream runs dry, or there may be one for a free slot."""
        seated = [stream for stream in self._seated if stream is not None]
        if any(self._is_scarce(stream) for stream in seated):
            return True
        # The next stream may come behind hours of one that is seated already: not at the price of keeping them all.
        is_light = sum(stream.num_waiting for stream in seated) < _MAX_WAITING_FRAMES
        return is_light and not self._waiting and self._has_free_slot()

    def can_step(self) -> bool:
        """Whether `step` would do anything: move a stream, or read what passes have made."""
        if self._waiting and self._has_free_slot():
            return True
        if any(self._is_open(stream) for bundle in self._started for stream in bundle.seated):
            return True
        return any(stream is not None and not self._is_dry(stream) for stream in self._seated)

    def accept(self, message: Codes | Failure) -> Iterator[Tokens | Failure]:
        """Take in one message; a failure ends its stream and is passed on."""
        failpoint("generate.before-accept")
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
        """Start a bundle of passes over the slots, read the one before; -> the streams that are now finished."""
        failpoint("generate.before-pass")
        self._seat()
        for slot, stream in enumerate(self._seated):
            if stream is not None:
                self._feed(slot, stream)
        has_started = self._start_bundle()
        num_unread = 1 if has_started and self._bundle > 1 else 0
        while len(self._started) > num_unread:
            yield from self._read(self._started.popleft())

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
                    self._seat()  # so that the next free slot is seen, too, before passes are started
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
        slot = stream.slot  # read once: other threads ask, and a failure may take the slot away meanwhile
        if stream.facts is not None or stream.num_feedable:
            return False
        return slot is None or not self._slots.may_move(slot)

    def _is_scarce(self, stream: _Stream) -> bool:
        """Whether the stream is dry, or could be before anybody looks again."""
        if stream.facts is not None or stream.num_feedable or stream.slot is None:
            return False
        return self._slots.num_ahead(stream.slot) < self._scarce_frames

    def _is_open(self, stream: _Stream | None) -> bool:
        """Whether it is there and waits for tokens."""
        return stream is not None and self._streams.get(stream.source.id) is stream

    def _is_free(self, slot: int) -> bool:
        """Whether nobody needs the slot: the passes started so far emit the last token of whoever is there."""
        stream = self._seated[slot]
        if stream is None:
            return True
        return stream.facts is not None and not stream.num_waiting and not self._slots.may_move(slot)

    def _has_free_slot(self) -> bool:
        return any(self._is_free(slot) for slot in range(self.num_slots))

    def _seat(self) -> None:
        for slot in range(self.num_slots):
            if self._waiting and self._is_free(slot):
                self._leave(slot)
                key = self._waiting.popleft()
                self._seated[slot] = self._streams[key]
                self._streams[key].slot = slot
                self._slots.start(slot, seed=_stream_seed(self._seed, key))

    def _leave(self, slot: int) -> None:
        stream = self._seated[slot]
        if stream is not None:
            self._seated[slot] = stream.slot = None

    def _feed(self, slot: int, stream: _Stream) -> None:
        """Write audio ahead, many frames at a time: it is embedded in one call."""
        count = min(stream.num_feedable, self._slots.room(slot))
        if count > 0 and self._slots.num_ahead(slot) < self._low_frames:
            self._slots.feed(slot, torch.from_numpy(stream.take(count)))

    def _start_bundle(self) -> bool:
        """False if there is nothing to move."""
        seated = [slot for slot, stream in enumerate(self._seated) if stream is not None]
        active = [slot for slot in seated if self._slots.may_move(slot)]
        if not active:
            return False
        longest = min(self._bundle, _SHORT_BUNDLE_PASSES) if self._has_free_slot() else self._bundle
        num_passes = self._slots.num_passes_until_news(active, at_most=longest)
        self._slots.step(num_passes)
        self.passes += num_passes
        self._started.append(_Bundle(report=self._slots.report(), seated=tuple(self._seated)))
        return True

    def _read(self, bundle: _Bundle) -> Iterator[Tokens]:
        for stream, harvest in zip(bundle.seated, self._slots.read(bundle.report), strict=True):
            self.slot_passes += harvest.num_moves
            self.positions += len(harvest.ids)
            if stream is not None and self._is_open(stream):
                stream.emit(harvest)
                if stream.is_finished:
                    yield self._finish(stream)

    def _finish(self, stream: _Stream) -> Tokens:
        failpoint("generate.before-finish")
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
        stream = self._streams.pop(key, None)
        if stream is None:
            return
        if key in self._waiting:
            self._waiting.remove(key)
        if stream.slot is not None:
            self._leave(stream.slot)


def _stream_seed(seed: int, source_id: str) -> int:
    """63 bits that depend on the run's seed and the source alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source_id}".encode()).digest()[:8], "big") >> 1
