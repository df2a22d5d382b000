"""The decoder in an actor, and everything after it: alignment, rows, the commit."""

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.host import GenerateHost, Result
from actors.lane import LaneReport, LaneSettings, Order, ShardReport, open_stages
from pipeline.errors import ModelFailure, SystemFailure
from pipeline.failpoints import failpoint
from pipeline.messages import Failure, Shard, Source
from pipeline.storage import Storage
from pipeline.versions import Version, check_in_force, check_not_newer
from pipeline.write import PartSummary, WriteStage, part_uri, read_error_ids, read_summary

_ENCODE_OBJECTS = 16  # x 60 s of codes, 0.8 kB per second of audio
# A shard whose streams have this much decoding ahead of them is not pulled further.
_MAX_PENDING_FRAMES = 30_000  # 40 minutes of audio
_POLL_SECONDS = 0.05
_QUEUED_SECONDS = 300.0


class DecoderActor:
    """The decoder on (a share of) one GPU, and everything after it. Runs as an async actor.

    Pulls codes from its encoder, one generator per open shard; all shards share the slots. The driver leads: it begins
    a shard, has its inputs done (all at once, or in groups where it looks for one that kills), and commits it.
    """

    def __init__(self, settings: LaneSettings, version: Version, encoder: Any) -> None:
        torch.set_num_threads(settings.num_threads)
        stages = open_stages(settings)
        self._encoder = encoder
        self._version = version
        options = settings.config.output.storage_options
        self._storage = Storage(options, conditional_puts=settings.conditional_puts)
        self._output_uri = settings.config.output.uri
        provenance = stages.provenance(settings.run_id)
        assert provenance.config_fingerprint == version.config_fingerprint, "the driver recorded other settings"
        self._write = WriteStage(self._storage, self._output_uri, provenance, columns=settings.config.output.columns)
        generate = stages.generate()
        self._num_slots = generate.num_slots
        self._host = GenerateHost(generate, stages.align(), on_death=self._engine_died)
        self._open: dict[str, OpenShard] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ready(self) -> int:
        """Answers with the process id once the weights are loaded."""
        self._loop = asyncio.get_running_loop()
        failpoint("decoder.before-ready")
        return os.getpid()

    async def report(self, *, wait_seconds: float) -> LaneReport:
        """Answer as soon as there is room for another shard, or after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        while not self._has_room() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        return LaneReport(
            has_room=self._has_room(),
            occupancy=self._host.occupancy,
            shards=tuple(work.report() for work in self._open.values()),
        )

    async def begin(self, order: Order) -> tuple[str, ...]:
        """Open a shard; -> the ids of the inputs that have to be done, none where its part is as it should be."""
        # Before anything is waited for, so that the next report counts it.
        work = self._open[order.shard.id] = OpenShard(order.shard)
        work.there, again = await asyncio.to_thread(self._look, order)
        if work.there is not None:
            work.todo = {id: source for id, source in work.todo.items() if id in again}
        blamed = {culprit.source_id: culprit for culprit in order.culprits if culprit.source_id in work.todo}
        work.results += [culprit.row(work.todo[id]) for id, culprit in blamed.items()]
        return tuple(id for id in work.todo if id not in blamed)

    async def transcribe(self, shard_id: str, ids: Sequence[str]) -> ShardReport:
        """Do some inputs of an open shard; -> how far the shard is now."""
        work = self._open[shard_id]
        await self._transcribe(work, [work.todo[id] for id in ids])
        return work.report()

    async def commit(self, shard_id: str) -> PartSummary:
        """Write the part of a shard all of whose inputs are done; what is there already and as it should be stays.

        Raises:
            Superseded: another run has put other settings in force.
        """
        work = self._open[shard_id]
        summary = await asyncio.to_thread(self._commit, work)
        del self._open[shard_id]
        return summary

    def _look(self, order: Order) -> tuple[PartSummary | None, frozenset[str]]:
        """The part that is there with the settings in force, and the ids of its inputs to be done again."""
        uri = part_uri(self._output_uri, order.shard.id)
        if not self._storage.exists(uri):
            return None, frozenset()
        there = read_summary(self._storage, uri)
        if not self._write.made(there):
            return None, frozenset()
        if order.retry_codes.isdisjoint(there.errors):
            return there, frozenset()
        return there, read_error_ids(self._storage, uri, order.retry_codes)

    def _commit(self, work: "OpenShard") -> PartSummary:
        if work.there is not None and not work.todo:
            return work.there
        failpoint("commit.before-check")
        check_in_force(self._version, self._output_uri, self._storage)
        if work.there is not None:
            return self._write.amend(work.shard, work.results)
        # Looked at again where there is a part: a process that stood still since then must not replace a newer one.
        newer = partial(check_not_newer, version=self._version, output_uri=self._output_uri, storage=self._storage)
        return self._write.commit(work.shard, work.results, check_replaceable=newer)

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
        self.there: PartSummary | None = None  # its part, if there is one with the settings in force
        self.todo = {source.id: source for source in shard.sources}  # in the order of the shard
        self.results: list[Result] = []
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.audio_seconds = 0.0

    @property
    def num_open(self) -> int:
        """Inputs without a result, those not asked for yet included."""
        return len(self.todo) - len(self.results)

    def remaining_seconds(self) -> float:
        """Estimated audio still to come."""
        share = len(self.todo) / len(self.shard.sources)
        return max(0.0, share * self.shard.estimated_seconds - self.audio_seconds)

    def report(self) -> ShardReport:
        """How far it is."""
        failures = [result for result in self.results if isinstance(result, Failure)]
        heard = [result for result in self.results if not isinstance(result, Failure)]
        return ShardReport(
            shard_id=self.shard.id,
            num_finished=len(self.results),
            errors=Counter(failure.code for failure in failures),
            example=f"{failures[0].source.uri}: {failures[0].message}" if failures else None,
            audio_seconds=math.fsum(result.facts.duration_seconds or 0.0 for result in heard),
        )


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
