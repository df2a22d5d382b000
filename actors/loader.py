"""Decoding and resampling on one CPU, and how a shard's inputs survive the death of the process that does it."""

from collections import Counter
from collections.abc import Iterator, Sequence

from actors.lane import LaneSettings, packed, worker_crashed
from pipeline.failpoints import failpoint
from pipeline.load import LoadStage
from pipeline.messages import Failure, Source, Waveform
from pipeline.storage import Storage

_MAX_STRIKES = 3  # deaths of a loader on one input before that input gets an error row


class LoadActor:
    """Decodes and resamples on one CPU. Holds no state between calls, so it can be replaced at any moment."""

    def __init__(self, settings: LaneSettings) -> None:
        failpoint("loader.before-ready")
        self._stage = LoadStage(Storage(settings.config.input.storage_options), settings.padding)

    def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    def load(self, sources: Sequence[Source], alone: bool) -> Iterator[list[Waveform | Failure]]:
        """Stream the waveforms of `sources`; `alone`: no object holds more than one input."""
        if not alone:
            yield from packed(self._stage.run(sources))
            return
        for source in sources:
            yield from packed(self._stage.run([source]))


class Journey:
    """How far the sources of one shard have come from their loader, whichever loader that is by now."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.todo = {source.id: source for source in sources}
        self.alone = False
        self._delivered: Counter[str] = Counter()  # pieces handed on, per stream
        self._seen: Counter[str] = Counter()  # pieces received from the present loader
        self._strikes: Counter[str] = Counter()

    def arrived(self, message: Waveform | Failure) -> Iterator[Waveform | Failure]:
        """Pass on what has not been passed on before; a new loader begins a half-delivered stream anew."""
        key = message.source.id
        self._seen[key] += 1
        if isinstance(message, Failure) or message.is_last:
            del self.todo[key]
        elif self._seen[key] <= self._delivered[key]:
            return
        self._delivered[key] += 1
        yield message

    def blame(self, error: Exception) -> Iterator[Failure]:
        """A loader died. Once inputs travel alone, the first one not delivered is the one it died on."""
        self._seen.clear()
        if not self.todo:
            return
        suspect = next(iter(self.todo.values()))
        self._strikes[suspect.id] += self.alone
        self.alone = True
        if self._strikes[suspect.id] >= _MAX_STRIKES:
            del self.todo[suspect.id]
            yield worker_crashed(suspect, stage="load", detail=f"{_MAX_STRIKES} times: {type(error).__name__}")
