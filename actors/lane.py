"""A lane's three kinds of actor, joined by pull: the decoder asks the encoder, the encoder asks a loader.

Each hop is a streaming generator with a bound on the objects not yet taken, so a slow stage stops the one before it.
The classes carry no decorator: they are wrapped where they are placed (`driver.py`), and tests can call them plainly.
Ray never retries here (`max_restarts=0`): a replayed generator would have to yield the same objects again. A dead
loader is replaced by its encoder; when anything else dies, the driver replaces the lane and does its shards again.
"""

import asyncio
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from actors.host import GenerateHost, Result
from pipeline.config import RunConfig
from pipeline.encode import EncodeStage
from pipeline.errors import ModelFailure, SystemFailure
from pipeline.fetch import fetch
from pipeline.messages import Codes, Failure, Shard, Source, Waveform
from pipeline.run import Stages, build_stages
from pipeline.storage import Storage, join
from pipeline.write import PartSummary, WriteStage, part_uri, read_summary

Message = TypeVar("Message", Waveform | Failure, Codes | Failure)

# Short files travel together, up to this much audio per object: a hop costs 0.3-0.6 ms however small the object.
_OBJECT_SECONDS = 60.0
_LOAD_OBJECTS = 4  # x 60 s x 96 kB = 23 MB of PCM between a loader and its encoder
_ENCODE_OBJECTS = 16  # x 60 s of codes, 0.8 kB per second of audio
# A shard whose streams have this much decoding ahead of them is not pulled further.
_MAX_PENDING_FRAMES = 30_000  # 40 minutes of audio
_POLL_SECONDS = 0.05
_MAX_STRIKES = 3  # deaths of a loader on one input before that input gets an error row

LOADER_DEAD = (RayActorError, ActorUnavailableError, OutOfMemoryError, ObjectLostError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSettings:
    """What every actor of a lane is told when it is placed."""

    config: RunConfig
    run_id: str
    model_revision: str  # as the driver resolved it; an actor that finds another refuses to work
    num_loaders: int
    loader_cpus: float
    num_threads: int  # of torch, in the encoder and in the decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReport:
    """How a lane is doing."""

    has_room: bool
    num_finished: int  # inputs of shards that are not yet committed
    num_errors: int
    audio_seconds: float
    occupancy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """An input that was alone in a lane when the lane died or its model raised."""

    source_id: str
    died: bool
    detail: str

    def row(self, source: Source) -> Failure:
        """Its error row."""
        if self.died:
            return worker_crashed(source, stage="generate", detail=self.detail)
        return Failure(source=source, stage="generate", code="MODEL_ERROR", message=self.detail)


class LoadActor:
    """Decodes and resamples on one CPU. Holds no state between calls, so it can be replaced at any moment."""

    def __init__(self, settings: LaneSettings) -> None:
        torch.set_num_threads(1)
        self._stage = _stages(settings).load()

    def load(self, sources: Sequence[Source], alone: bool) -> Iterator[list[Waveform | Failure]]:
        """Stream the waveforms of `sources`; `alone`: no object holds more than one input."""
        if not alone:
            yield from _packed(self._stage.run(sources))
            return
        for source in sources:
            yield from _packed(self._stage.run([source]))


class EncoderActor:
    """Mimi on (a share of) one GPU, fed by its own loaders. Runs as a threaded actor: one thread per open shard."""

    def __init__(self, settings: LaneSettings) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._stage: EncodeStage = _stages(settings).encode()
        self._one_at_a_time = threading.Lock()  # the device does one piece at a time anyway
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(settings.num_loaders):
            self._idle.put(self._new_loader())

    def encode(self, sources: Sequence[Source]) -> Iterator[list[Codes | Failure]]:
        """Stream the codes of `sources`."""
        yield from _packed(self._codes(sources))

    def _new_loader(self) -> Any:
        loader: Any = ray.remote(LoadActor)
        return loader.options(num_cpus=self._settings.loader_cpus, max_restarts=0, max_task_retries=0).remote(
            self._settings
        )

    def _codes(self, sources: Sequence[Source]) -> Iterator[Codes | Failure]:
        for message in self._waveforms(sources):
            with self._one_at_a_time:
                encoded = list(self._stage.accept(message))
            yield from encoded

    def _waveforms(self, sources: Sequence[Source]) -> Iterator[Waveform | Failure]:
        """Pull from one loader; when it dies, go on with a new one where the old one stopped."""
        journey = _Journey(sources)
        loader = self._idle.get()
        try:
            while journey.todo:
                try:
                    yield from self._pull(loader, journey)
                except LOADER_DEAD as error:
                    ray.kill(loader)
                    loader = self._new_loader()
                    yield from journey.blame(error)
        finally:
            self._idle.put(loader)

    def _pull(self, loader: Any, journey: "_Journey") -> Iterator[Waveform | Failure]:
        options: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": _LOAD_OBJECTS}
        objects = loader.load.options(**options).remote(list(journey.todo.values()), journey.alone)
        try:
            for reference in objects:
                for message in ray.get(reference):
                    yield from journey.arrived(message)
        except GeneratorExit:
            ray.cancel(objects)  # nobody listens any more; left alone it would decode to its end
            raise


class _Journey:
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


class DecoderActor:
    """The decoder on (a share of) one GPU, and everything after it. Runs as an async actor.

    Pulls codes from its encoder, one generator per open shard; all shards share the slots.
    """

    def __init__(self, settings: LaneSettings, encoder: Any) -> None:
        torch.set_num_threads(settings.num_threads)
        stages = _stages(settings)
        self._encoder = encoder
        self._storage = Storage(settings.config.output.storage_options)
        self._output_uri = settings.config.output.uri
        self._write = WriteStage(
            self._storage,
            self._output_uri,
            stages.provenance(settings.run_id),
            columns=settings.config.output.columns,
        )
        generate = stages.generate()
        self._num_slots = generate.num_slots
        self._host = GenerateHost(generate, stages.align(), on_death=self._engine_died)
        self._open: dict[str, _OpenShard] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ready(self) -> int:
        """Answers with the process id once the weights are loaded."""
        self._loop = asyncio.get_running_loop()
        return os.getpid()

    async def report(self, *, wait_seconds: float) -> LaneReport:
        """Answer as soon as there is room for another shard, or after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        while not self._has_room() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        shards = self._open.values()
        return LaneReport(
            has_room=self._has_room(),
            num_finished=sum(len(shard.results) for shard in shards),
            num_errors=sum(isinstance(result, Failure) for shard in shards for result in shard.results),
            audio_seconds=sum(shard.audio_seconds for shard in shards),
            occupancy=self._host.occupancy,
        )

    async def transcribe(self, shard: Shard, *, culprits: Sequence[Culprit], alone: bool) -> PartSummary:
        """Do one shard and commit its part; a part that is there already is left as it is.

        Args:
            shard: what to do.
            culprits: inputs that ended a lane; they get their error row without being touched.
            alone: one input at a time, each named in the journal before it is touched.
        """
        uri, mark = part_uri(self._output_uri, shard.id), mark_uri(self._output_uri, shard.id)
        if await asyncio.to_thread(self._storage.exists, uri):
            return await asyncio.to_thread(read_summary, self._storage, uri)
        work = self._open[shard.id] = _OpenShard(shard)
        try:
            blamed = {culprit.source_id: culprit for culprit in culprits}
            todo = [source for source in shard.sources if source.id not in blamed]
            work.results += [blamed[source.id].row(source) for source in shard.sources if source.id in blamed]
            for group in [[source] for source in todo] if alone else [todo]:
                if alone:
                    await asyncio.to_thread(self._storage.overwrite, mark, group[0].id.encode())
                await self._transcribe(work, group)
            summary = await asyncio.to_thread(self._write.commit, shard, work.results)
            if alone:
                await asyncio.to_thread(self._storage.delete, mark)
            return summary
        finally:
            del self._open[shard.id]

    async def _transcribe(self, work: "_OpenShard", sources: Sequence[Source]) -> None:
        if not sources:
            return
        waiting = {source.id: asyncio.get_running_loop().create_future() for source in sources}
        work.waiting.update(waiting)
        for source in sources:
            self._host.expect(source.id, self._deliver)
        options: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": _ENCODE_OBJECTS}
        objects = self._encoder.encode.options(**options).remote(list(sources))
        try:
            async for reference in objects:
                self._host.put(await reference)
                await self._not_too_far_ahead(waiting)
            await asyncio.gather(*waiting.values())
        except RayTaskError as error:
            raise ModelFailure(f"the encoder failed: {error.cause}") from None
        finally:
            ray.cancel(objects)  # a no-op once it is exhausted

    async def _not_too_far_ahead(self, waiting: dict[str, "asyncio.Future[None]"]) -> None:
        while (self._host.num_pending_frames(waiting) or 0) > _MAX_PENDING_FRAMES:
            await asyncio.sleep(_POLL_SECONDS)

    def _deliver(self, result: Result) -> None:
        """On the host's thread: bring a result to the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._arrived, result)

    def _arrived(self, result: Result) -> None:
        for work in self._open.values():
            future = work.waiting.pop(result.source.id, None)
            if future is not None:
                work.results.append(result)
                work.audio_seconds += result.facts.duration_seconds or 0.0
                if not future.done():
                    future.set_result(None)
                return

    def _engine_died(self, error: ModelFailure) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._fail_all, error)

    def _fail_all(self, error: ModelFailure) -> None:
        for work in self._open.values():
            for future in work.waiting.values():
                if not future.done():
                    future.set_exception(error)

    def _has_room(self) -> bool:
        """Credit in rows and in audio seconds, so that neither many short files nor one long one starve a slot."""
        waiting_rows = sum(len(work.waiting) for work in self._open.values()) - self._host.num_seated
        free_slots = self._num_slots - self._host.num_seated
        waiting_seconds = sum(work.remaining_seconds() for work in self._open.values())
        return waiting_rows < free_slots or (waiting_rows < self._num_slots / 4 and waiting_seconds < 300)


class _OpenShard:
    """A shard in the decoder's hands."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.results: list[Result] = []
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.audio_seconds = 0.0

    def remaining_seconds(self) -> float:
        """Estimated audio still to come."""
        return max(0.0, self.shard.estimated_seconds - self.audio_seconds)


def worker_crashed(source: Source, *, stage: str, detail: str) -> Failure:
    """The error row of an input that kills processes."""
    message = (
        f"the process working on this input died ({detail}) with nothing else in its hands, after others had died with "
        "it; the input is left out. If it plays elsewhere, please report it"
    )
    return Failure(source=source, stage=stage, code="WORKER_CRASHED", message=message)


def mark_uri(output_uri: str, shard_id: str) -> str:
    """Where the input in hand is named while a suspect shard is done one input at a time."""
    return join(output_uri, "_kikitori", "journal", f"{shard_id}.in-hand")


def _stages(settings: LaneSettings) -> Stages:
    """Open the checkpoint on this node, and make sure that it is the one the driver planned with."""
    config = settings.config
    fetched = fetch(config.checkpoint.model_copy(update={"revision": settings.model_revision}))
    if fetched.revision != settings.model_revision:
        raise SystemFailure(
            f"this node's copy of checkpoint {fetched.model_id} is revision {fetched.revision}, "
            f"the driver's is {settings.model_revision}"
        )
    return build_stages(config, fetched)


def _packed(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Group messages into objects of about `_OBJECT_SECONDS` of audio."""
    group: list[Message] = []
    seconds = 0.0
    for message in messages:
        group.append(message)
        seconds += _audio_seconds(message)
        if seconds >= _OBJECT_SECONDS:
            yield group
            group, seconds = [], 0.0
    if group:
        yield group


def _audio_seconds(message: Waveform | Codes | Failure) -> float:
    if isinstance(message, Waveform):
        return len(message.samples) / 24_000
    if isinstance(message, Codes):
        return message.codes.shape[1] / 12.5
    return 0.1  # many failures in a row should travel too
