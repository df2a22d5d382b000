"""Decoding and resampling on one CPU, and how a shard's inputs survive the death of the process that does it."""

import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.lane import LaneSettings, packed, worker_crashed
from pipeline.failpoints import failpoint
from pipeline.load import LoadStage
from pipeline.messages import Failure, Source, Waveform
from pipeline.storage import Storage

_MAX_STRIKES = 3  # deaths of a loader on one input before that input gets an error row
_BYTES_PER_SECOND = 1e6  # how slow a storage may be before fetching an input from it counts as standing still


class LoadActor:
    """Decodes and resamples on one CPU. Holds no state between calls, so it can be replaced at any moment."""

    def __init__(self, settings: LaneSettings) -> None:
        failpoint("loader.before-ready")
        config = settings.config
        self._memory_gib = config.stages.load.memory_gib
        longest_seconds = config.input.max_audio_hours * 3600
        self._stage = LoadStage(
            Storage(config.input.storage_options), settings.padding, longest_seconds=longest_seconds
        )

    def ready(self) -> bool:
        """Answers once the process is up; from then on its memory is limited."""
        limit_memory(self._memory_gib)
        return True

    def load(self, sources: Sequence[Source], alone: bool) -> Iterator[list[Waveform | Failure]]:
        """Stream the waveforms of `sources`; `alone`: no object holds more than one input."""
        if not alone:
            yield from packed(self._stage.run(sources))
            return
        for source in sources:
            yield from packed(self._stage.run([source]))


def limit_memory(more_gib: float) -> None:
    """Let this process take so much more than it has; beyond, malloc fails, and decoding with a MemoryError.

    Counted is what is really the process's own and can be written (RLIMIT_DATA), not Ray's shared object store.
    """
    status = Path("/proc/self/status").read_text()
    data_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    limit_bytes = data_kib * 1024 + int(more_gib * 2**30)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit_bytes < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


class Stalled(Exception):
    """A loader gave nothing for longer than anything should take."""


class Journey:
    """How far the sources of one shard have come from their loader, whichever loader that is by now."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.todo = {source.id: source for source in sources}
        self.alone = False
        self._delivered: Counter[str] = Counter()  # pieces handed on, per stream
        self._seen: Counter[str] = Counter()  # pieces received from the present loader
        self._strikes: Counter[str] = Counter()

    def patience_seconds(self, stall_seconds: float) -> float:
        """How long the loader may take for its next object, which may hold any of what is still to come."""
        largest_bytes = max((source.size_bytes or 0 for source in self.todo.values()), default=0)
        return stall_seconds + largest_bytes / _BYTES_PER_SECOND

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
        """A loader died or stands still. Once inputs travel alone, the first one not delivered is the one it was on."""
        self._seen.clear()
        if not self.todo:
            return
        suspect = next(iter(self.todo.values()))
        is_alone, self.alone = self.alone, True
        if is_alone and isinstance(error, Stalled):
            del self.todo[suspect.id]
            yield Failure(source=suspect, stage="load", code="DECODE_TIMEOUT", message=str(error))
            return
        self._strikes[suspect.id] += is_alone
        if self._strikes[suspect.id] >= _MAX_STRIKES:
            del self.todo[suspect.id]
            yield worker_crashed(suspect, stage="load", detail=f"{_MAX_STRIKES} times: {type(error).__name__}")
