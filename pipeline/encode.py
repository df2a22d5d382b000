"""Waveform -> Codes: each stream's audio through the Mimi encoder, piece by piece, its state carried along.

Two ways. `EncodeStage` takes every stream by itself, in long pieces: right for a CPU, which one stream keeps busy.
`BatchEncodeStage` takes the streams that are there side by side, in short pieces: right for a GPU. Either way pieces
are cut at fixed places of their stream, so its codes cannot depend on its neighbours or on how its waveform was cut.
The codes of one frame need the whole past of the encoder's window, so the state stays here as long as the stream lasts.

Both may be `run` by several threads at once, each with an inbox of its own.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from models.mimi import MimiEncoder, MimiState
from models.rows import EncoderRows
from pipeline.failpoints import failpoint
from pipeline.messages import AudioFacts, Codes, Failure, Source, Waveform

# Audio pulled ahead in search of streams for free rows, per row: rows are full where files last no longer than this.
# With 16 rows it is 640 s, 61 MB. Of a file of 24 hours no more than that is here at a time.
_AHEAD_SECONDS = 40.0
# A waiting thread is woken by whoever changes something; this is for the case that nobody does.
_WAIT_SECONDS = 1.0


@dataclass(slots=True)
class _LoneStream:
    state: MimiState
    pending: list[NDArray[np.float32]] = field(default_factory=list)  # samples not yet encoded
    num_pending: int = 0


class EncodeStage:
    """Mimi over one stream at a time, in pieces of at most `piece_seconds`."""

    def __init__(self, mimi: MimiEncoder, *, piece_seconds: float) -> None:
        self._mimi = mimi
        self._piece_frames = _num_frames(mimi, piece_seconds)
        self._device = mimi.downsample.weight.device
        self._streams: dict[str, _LoneStream] = {}
        self._one_at_a_time = threading.Lock()  # the device does one piece at a time anyway

    def run(self, inbox: Iterable[Waveform | Failure]) -> Iterator[Codes | Failure]:
        """Encode pieces as they come."""
        for message in inbox:
            failpoint("encode.before-piece")
            with self._one_at_a_time:
                encoded = list(self._accept(message))
            failpoint("encode.after-piece")
            yield from encoded

    def _accept(self, message: Waveform | Failure) -> Iterator[Codes | Failure]:
        """Take in one piece; -> what can be encoded by now. A failure ends its stream and is passed on."""
        if isinstance(message, Failure):
            self._streams.pop(message.source.id, None)
            yield message
            return
        stream = self._streams.get(message.source.id)
        if stream is None:
            stream = _LoneStream(state=self._mimi.new_state(1, max_frames=self._piece_frames))
            self._streams[message.source.id] = stream
        stream.pending.append(message.samples)
        stream.num_pending += len(message.samples)
        piece_samples = self._piece_frames * self._mimi.config.frame_samples
        while stream.num_pending > piece_samples:
            yield self._codes(message.source, stream, piece_samples, is_last=False, facts=None)
        if message.is_last:
            yield self._codes(message.source, stream, stream.num_pending, is_last=True, facts=message.facts)
            del self._streams[message.source.id]

    def _codes(
        self, source: Source, stream: _LoneStream, num_samples: int, *, is_last: bool, facts: AudioFacts | None
    ) -> Codes:
        samples = np.concatenate(stream.pending)
        stream.pending = [samples[num_samples:]]
        stream.num_pending -= num_samples
        samples_BS = torch.from_numpy(samples[None, :num_samples]).to(self._device)
        codes = self._mimi.encode(samples_BS, stream.state)[0].to(torch.int16).cpu().numpy()
        return Codes(source=source, codes=codes, is_last=is_last, facts=facts)


@dataclass(slots=True, eq=False)
class _Inbox:
    """One caller of `BatchEncodeStage.run`: its open streams, and what is ready for it."""

    streams: "dict[str, _Stream]" = field(default_factory=lambda: {})
    outbox: deque[Codes | Failure] = field(default_factory=deque[Codes | Failure])

    @property
    def num_pending(self) -> int:
        """Samples that have come and are not encoded."""
        return sum(stream.num_pending for stream in self.streams.values())


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream that waits for a row or has one."""

    source: Source
    inbox: _Inbox
    pieces: deque[NDArray[np.float32]] = field(default_factory=deque[NDArray[np.float32]])  # oldest first
    num_pending: int = 0  # samples in `pieces`
    row: int | None = None
    has_begun: bool = False
    is_over: bool = False  # has the last piece come?
    facts: AudioFacts | None = None

    def put(self, message: Waveform) -> None:
        """Take samples in."""
        if len(message.samples):
            self.pieces.append(message.samples)
        self.num_pending += len(message.samples)
        self.is_over, self.facts = message.is_last, message.facts

    def take(self, count: int) -> NDArray[np.float32]:
        """The next `count` samples."""
        self.num_pending -= count
        taken: list[NDArray[np.float32]] = []
        while count:
            piece = self.pieces.popleft()
            if len(piece) > count:
                self.pieces.appendleft(piece[count:])
            taken.append(piece[:count])
            count -= len(taken[-1])
        return np.concatenate(taken)


class BatchEncodeStage:
    """Mimi over `num_rows` streams at once, in pieces of `piece_seconds`.

    A row is a stream's until the stream ends. A row whose next piece is not complete sits out a call and keeps its
    state, so nobody waits for a slow source; what sitting out costs is the work of an idle row.

    After an exception from the model every call raises: the state of any row may be half a piece ahead.
    """

    def __init__(self, mimi: MimiEncoder, *, num_rows: int, piece_seconds: float) -> None:
        self._rows = EncoderRows(mimi, num_rows, piece_frames=_num_frames(mimi, piece_seconds))
        self._no_codes_K0 = np.zeros((mimi.config.num_codebooks, 0), np.int16)
        self._most_ahead = int(num_rows * _AHEAD_SECONDS * mimi.config.sample_rate_hz)
        self._seated: list[_Stream | None] = [None] * num_rows
        self._waiting: deque[_Stream] = deque()
        self._inboxes: list[_Inbox] = []
        self._is_broken = False
        self._changed = threading.Condition()  # guards all of the above
        self.num_calls = 0
        self.num_frames = 0  # of streams; divided by calls, rows and frames of a piece: the share that is no surplus

    @property
    def num_pending(self) -> int:
        """Samples that have come and are not encoded, of all inboxes."""
        return sum(inbox.num_pending for inbox in self._inboxes)

    def run(self, inbox: Iterable[Waveform | Failure]) -> Iterator[Codes | Failure]:
        """Pull while little is waiting, encode when enough is, until everything that came is encoded.

        Streams of an inbox that is abandoned are forgotten.
        """
        mine = _Inbox()
        with self._changed:
            self._inboxes.append(mine)
        try:
            yield from self._serve(iter(inbox), mine)
        finally:
            with self._changed:
                self._inboxes.remove(mine)
                for stream in list(mine.streams.values()):
                    self._end(stream)

    def _serve(self, messages: Iterator[Waveform | Failure], mine: _Inbox) -> Iterator[Codes | Failure]:
        exhausted = False
        while not exhausted or mine.streams:
            if not exhausted and self._wants_input(mine):
                message = next(messages, None)  # may take long: others go on meanwhile
                if message is None:
                    exhausted = True
                    assert all(stream.is_over for stream in mine.streams.values()), "a stream has no end"
                else:
                    failpoint("encode.before-piece")
                    self._accept(message, mine)
            else:
                self._step_or_wait(mine)
            while mine.outbox:
                yield mine.outbox.popleft()

    def _wants_input(self, mine: _Inbox) -> bool:
        """Whether to pull: little is there, or a row of this inbox cannot go on without it.

        Where a loader reads one file after the other, what comes next belongs to that row, so this stays bounded.
        """
        with self._changed:
            if mine.num_pending <= self._most_ahead / len(self._inboxes):
                return True
            seated = [stream for stream in mine.streams.values() if stream.row is not None]
            return bool(seated) and not any(self._is_ready(stream) for stream in seated)

    def _accept(self, message: Waveform | Failure, mine: _Inbox) -> None:
        with self._changed:
            stream = mine.streams.get(message.source.id)
            if isinstance(message, Failure):
                if stream is not None:
                    self._end(stream)
                mine.outbox.append(message)
                return
            if stream is None:
                stream = mine.streams[message.source.id] = _Stream(source=message.source, inbox=mine)
                self._waiting.append(stream)
                self._seat()
            stream.put(message)
            if stream.is_over and not stream.num_pending:  # there is nothing left to encode
                self._hand_on(stream, self._no_codes_K0)

    def _step_or_wait(self, mine: _Inbox) -> None:
        """Encode if that moves a stream of this inbox; else somebody else has the rows, and will give them back."""
        with self._changed:
            if self._is_broken:
                raise RuntimeError("the encoder failed in an earlier call")
            if any(self._is_ready(stream) for stream in mine.streams.values()):
                self._step()
                self._changed.notify_all()
            elif not mine.outbox:
                self._changed.wait(_WAIT_SECONDS)

    def _step(self) -> None:
        """One call; what comes out goes to the inboxes that its streams came from."""
        moving = {row: stream for row, stream in enumerate(self._seated) if stream and self._is_ready(stream)}
        pieces = {row: one.take(min(one.num_pending, self._rows.piece_samples)) for row, one in moving.items()}
        self._is_broken = True  # until it returns
        self._rows.start([row for row, stream in moving.items() if not stream.has_begun])
        codes = self._rows.encode(pieces)
        failpoint("encode.after-piece")
        self._is_broken = False
        self.num_calls += 1
        for row, stream in moving.items():
            stream.has_begun = True
            self.num_frames += codes[row].shape[1]
            self._hand_on(stream, codes[row])

    def _is_ready(self, stream: _Stream) -> bool:
        """Whether the next call would move it."""
        enough = 1 if stream.is_over else self._rows.piece_samples
        return stream.row is not None and stream.num_pending >= enough

    def _hand_on(self, stream: _Stream, codes_KT: NDArray[np.int16]) -> None:
        is_last = stream.is_over and not stream.num_pending
        facts = stream.facts if is_last else None
        stream.inbox.outbox.append(Codes(source=stream.source, codes=codes_KT, is_last=is_last, facts=facts))
        if is_last:
            self._end(stream)

    def _end(self, stream: _Stream) -> None:
        del stream.inbox.streams[stream.source.id]
        if stream.row is None:
            self._waiting.remove(stream)
        else:
            self._seated[stream.row] = None
            self._seat()
        self._changed.notify_all()

    def _seat(self) -> None:
        for row, seated in enumerate(self._seated):
            if seated is None and self._waiting:
                stream = self._seated[row] = self._waiting.popleft()
                stream.row = row


def _num_frames(mimi: MimiEncoder, seconds: float) -> int:
    return max(1, round(seconds * mimi.config.frame_rate_hz))
