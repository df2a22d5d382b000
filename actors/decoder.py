"""The decoder in an actor, and everything after it: alignment, rows, the commit."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.host import GenerateHost, Result
from actors.lane import Culprit, LaneReport, LaneSettings, mark_uri, open_stages
from pipeline.errors import ModelFailure, SystemFailure
from pipeline.messages import Failure, Shard, Source
from pipeline.storage import Storage
from pipeline.write import PartSummary, WriteStage, part_uri, read_summary

_ENCODE_OBJECTS = 16  # x 60 s of codes, 0.8 kB per second of audio
# A shard whose streams have this much decoding ahead of them is not pulled further.
_MAX_PENDING_FRAMES = 30_000  # 40 minutes of audio
_POLL_SECONDS = 0.05
_QUEUED_SECONDS = 300.0


class DecoderActor:
    """The decoder on (a share of) one GPU, and everything after it. Runs as an async actor.

    Pulls codes from its encoder, one generator per open shard; all shards share the slots.
    """

    def __init__(self, settings: LaneSettings, encoder: Any) -> None:
        torch.set_num_threads(settings.num_threads)
        stages = open_stages(settings)
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
        self._open: dict[str, OpenShard] = {}
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
        # Before anything is waited for, so that the next report counts it.
        work = self._open[shard.id] = OpenShard(shard)
        try:
            if await asyncio.to_thread(self._storage.exists, uri):
                return await asyncio.to_thread(read_summary, self._storage, uri)
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

    async def _transcribe(self, work: "OpenShard", sources: Sequence[Source]) -> None:
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
            if isinstance(error.cause, SystemFailure):  # not over an input
                raise SystemFailure(str(error.cause)) from None
            raise ModelFailure(f"the encoder failed: {error.cause}") from None
        finally:
            ray.cancel(objects)  # a no-op once it is exhausted

    async def _not_too_far_ahead(self, waiting: dict[str, "asyncio.Future[None]"]) -> None:
        while (self._host.num_pending_frames(waiting) or 0) > _MAX_PENDING_FRAMES:
            self._host.put([])  # raises if the engine has died: then the number would never fall
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
        return has_room(
            num_open=sum(work.num_open for work in self._open.values()),
            num_seated=self._host.num_seated,
            num_slots=self._num_slots,
            waiting_seconds=sum(work.remaining_seconds() for work in self._open.values()),
        )


class OpenShard:
    """A shard in the decoder's hands."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.results: list[Result] = []
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.audio_seconds = 0.0

    @property
    def num_open(self) -> int:
        """Inputs without a result, those not asked for yet included."""
        return len(self.shard.sources) - len(self.results)

    def remaining_seconds(self) -> float:
        """Estimated audio still to come."""
        return max(0.0, self.shard.estimated_seconds - self.audio_seconds)


def has_room(*, num_open: int, num_seated: int, num_slots: int, waiting_seconds: float) -> bool:
    """Whether a lane should get another shard: while slots may stand empty, or the queue behind them is short.

    Credit is in streams and in audio seconds: with streams alone, one lane would hoard the hours-long files; with
    seconds alone, short files would leave slots empty.

    Args:
        num_open: streams of open shards that are not finished.
        num_seated: those of them that hold a slot.
        num_slots: slots of the lane.
        waiting_seconds: estimated audio still to be decoded.
    """
    num_waiting = num_open - num_seated
    if num_waiting < num_slots - num_seated:
        return True
    return num_waiting < num_slots / 4 and waiting_seconds < _QUEUED_SECONDS
