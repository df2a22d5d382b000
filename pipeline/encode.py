"""Waveform -> Codes: each stream's audio through the Mimi encoder, piece by piece, its state carried along.

Every stream is encoded by itself, in pieces cut at fixed places, so its codes cannot depend on its neighbours or on
how its waveform happened to be cut. The codes of one frame need the whole past of the encoder's window, so the state
stays here for as long as the stream lasts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from models.mimi import MimiEncoder, MimiState
from pipeline.messages import AudioFacts, Codes, Failure, Source, Waveform


@dataclass(slots=True)
class _Stream:
    state: MimiState
    pending: list[NDArray[np.float32]] = field(default_factory=list)  # samples not yet encoded
    num_pending: int = 0


class EncodeStage:
    """Mimi over pieces of at most `piece_seconds`."""

    def __init__(self, mimi: MimiEncoder, *, piece_seconds: float) -> None:
        self._mimi = mimi
        self._piece_frames = max(1, round(piece_seconds * mimi.config.frame_rate_hz))
        self._device = mimi.downsample.weight.device
        self._streams: dict[str, _Stream] = {}

    def run(self, inbox: Iterable[Waveform | Failure]) -> Iterator[Codes | Failure]:
        """Encode pieces as they come."""
        for message in inbox:
            yield from self.accept(message)

    def accept(self, message: Waveform | Failure) -> Iterator[Codes | Failure]:
        """Take in one piece; -> what can be encoded by now. A failure ends its stream and is passed on."""
        if isinstance(message, Failure):
            self._streams.pop(message.source.id, None)
            yield message
            return
        stream = self._streams.get(message.source.id)
        if stream is None:
            stream = _Stream(state=self._mimi.new_state(1, max_frames=self._piece_frames))
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
        self, source: Source, stream: _Stream, num_samples: int, *, is_last: bool, facts: AudioFacts | None
    ) -> Codes:
        samples = np.concatenate(stream.pending)
        stream.pending = [samples[num_samples:]]
        stream.num_pending -= num_samples
        samples_BS = torch.from_numpy(samples[None, :num_samples]).to(self._device)
        codes = self._mimi.encode(samples_BS, stream.state)[0].to(torch.int16).cpu().numpy()
        return Codes(source=source, codes=codes, is_last=is_last, facts=facts)
