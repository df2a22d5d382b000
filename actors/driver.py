"""Shards in, parts out: places lanes, hands shards to lanes that have room, replaces what dies, and stops cleanly.

The driver holds descriptions and summaries only; audio, codes and rows never pass through it. All retries are decided
here and nowhere else: a lane that loses a process is given up as a whole and its open shards are queued again. A shard
that was open in several dying lanes is suspect: it is alone with its lane and done in groups, so that an input which
kills processes is found, gets its error row, and the rest of its shard is transcribed (`journal.py` says how).
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    WorkerCrashedError,
)
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.alarm import Alarm
from actors.cluster import LaneRequest
from actors.decoder import DecoderActor
from actors.encoder import EncoderActor
from actors.journal import Case, Journal
from actors.lane import LaneReport, LaneSettings, Order, ShardReport
from pipeline.errors import ModelFailure, Superseded, SystemFailure
from pipeline.failpoints import failpoint
from pipeline.messages import Shard, ShardRef
from pipeline.versions import Version
from pipeline.write import PartSummary

logger = logging.getLogger(__name__)

LANE_DEAD = (
    RayActorError,
    ActorUnavailableError,
    WorkerCrashedError,
    ObjectLostError,
    OwnerDiedError,
    NodeDiedError,
    OutOfMemoryError,
)
_MAX_FRUITLESS = 4  # crashes of one shard, in a row, that told nothing
_MAX_ERRORS = 3  # exceptions (not deaths) of one shard: a bug or a storage that stays away
_MAX_FAILED_STARTS = 4  # of lanes, in a row, without a commit and while no lane is up
_REPORT_SECONDS = 1.0
_IDLE_SECONDS = 0.2
_DRAIN_SECONDS = 20.0
_PENDING_SECONDS = 30.0  # between two lines that say a lane still has no place
_GATHERING_SECONDS = 60.0  # at the beginning, lanes that are not up yet are counted on
# With no lane left: longer than a cluster needs to bring a new machine, if it can.
_NO_CAPACITY_SECONDS = 900.0
_SUSPECT = "suspect"


@dataclass(slots=True)
class Progress:
    """What is known of a run while it goes on."""

    num_inputs: int
    num_committed: int = 0  # inputs whose part is on storage
    num_shards: int = 0  # committed by this run
    num_errors: int = 0
    audio_seconds: float = 0.0
    lanes: dict[int, LaneReport] = field(default_factory=dict[int, LaneReport])
    num_lost_lanes: int = 0

    def totals(self) -> tuple[int, int, float]:
        """Inputs, errors and audio seconds done: what is committed and what the lanes have in hand."""
        reports = self.lanes.values()
        return (
            self.num_committed + sum(report.num_finished for report in reports),
            self.num_errors + sum(report.num_errors for report in reports),
            self.audio_seconds + sum(report.audio_seconds for report in reports),
        )


@dataclass(slots=True)
class _Task:
    """A shard and its history."""

    shard: ShardRef
    case: Case
    in_hand: tuple[str, ...] = ()  # what is being done, while the shard is alone with its lane
    fruitless: int = 0  # crashes since the last one that told us something
    errors: int = 0


@dataclass(slots=True)
class _Lane:
    """A lane that is up."""

    index: int
    decoder: Any
    open: dict[str, "asyncio.Task[None]"] = field(default_factory=dict[str, "asyncio.Task[None]"])
    dead: bool = False
    given_up: bool = False  # dead because we wanted it, over an error: no shard is to blame


class Driver:
    """One execution of the remaining shards of a plan.

    Args:
        settings: what lanes are told.
        version: of the output's settings.
        request: what a lane reserves.
        num_lanes: how many lanes to hold at most.
        shards: what is to be done, in this order.
        load_shard: reads the sources of one, when its turn comes.
        retry_codes: of parts that are there, inputs with these error codes are done again.
        journal: remembers what killed lanes.
        alarm: says when too much went wrong.
        progress: kept up to date.
    """

    def __init__(
        self,
        settings: LaneSettings,
        version: Version,
        request: LaneRequest,
        *,
        num_lanes: int,
        shards: Sequence[ShardRef],
        load_shard: Callable[[ShardRef], Shard],
        retry_codes: frozenset[str],
        journal: Journal,
        alarm: Alarm,
        progress: Progress,
    ) -> None:
        self._settings, self._version, self._request = settings, version, request
        self._num_lanes = min(num_lanes, len(shards))
        self._shards, self._load_shard = shards, load_shard
        self._retry_codes = retry_codes
        self._todo: deque[_Task] = deque()
        self._num_left = len(shards)
        self._num_open = 0
        self._journal, self._alarm, self._progress = journal, alarm, progress
        self._finished = asyncio.Event()
        self._stopping = False
        self._fatal: Exception | None = None
        self._up: set[int] = set()
        self._placed: set[int] = set()
        self._unplaced_since: float | None = None  # since the last lane lost its place; None before the first had one
        self._failed_starts = 0  # in a row, since the last commit
        self._begun = time.monotonic()

    async def run(self) -> None:
        """Work until every shard is committed, or `stop` was called and the open ones are done or given up.

        Raises:
            SystemFailure: no lane comes up, a shard fails again and again, or too much is in error; what is committed
                stays.
        """
        if not self._num_left:
            return
        cases = await asyncio.to_thread(self._journal.read, acquitted=self._retry_codes)
        tasks = [_Task(shard, cases.get(shard.id) or Case(shard.id)) for shard in self._shards]
        self._todo.extend(sorted(tasks, key=lambda task: task.case.is_suspect))  # last, as in `_again`
        lanes = [asyncio.create_task(self._keep_lane(index)) for index in range(self._num_lanes)]
        finished = asyncio.create_task(self._finished.wait())
        # A lane's keeper ends before that only by an exception nobody foresaw; without it the run would wait for ever.
        ended, _ = await asyncio.wait({finished, *lanes}, return_when=asyncio.FIRST_COMPLETED)
        for task in [finished, *lanes]:
            task.cancel()
        await asyncio.gather(finished, *lanes, return_exceptions=True)
        for lane in ended - {finished}:
            lane.result()
        if self._fatal is not None:
            raise self._fatal

    def stop(self) -> None:
        """Take no more shards; give the open ones a little time, then leave. Asked a second time: leave at once."""
        if self._stopping or not self._num_open:
            self._finished.set()
            return
        self._stopping = True
        self._todo.clear()
        asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self._finished.set)

    async def _keep_lane(self, index: int) -> None:
        """Have a lane, and another one when it is lost."""
        pause = 0.5
        while not self._finished.is_set():
            try:
                if await self._live(index):
                    pause = 0.5
            except (*LANE_DEAD, SystemFailure) as error:
                self._start_failed(error)
            await asyncio.sleep(pause)
            pause = min(30.0, 2 * pause)

    def _start_failed(self, error: Exception) -> None:
        """A lane died while starting. Others may be at work; where none is, this cannot go on for ever."""
        self._failed_starts += 1
        logger.warning("a lane did not start: %s", _reason(error))
        if not self._up and self._failed_starts >= _MAX_FAILED_STARTS:
            reason = _reason(error)
            self._fail(SystemFailure(f"no lane came up in {self._failed_starts} attempts; the last one: {reason}"))

    async def _wait_for_place(self, group: Any) -> None:
        """Pending means that the cluster is full, or is asked to grow."""
        placed = asyncio.ensure_future(group.ready())
        while True:
            done, _ = await asyncio.wait({placed}, timeout=min(_PENDING_SECONDS, _NO_CAPACITY_SECONDS))
            if done:
                placed.result()
                return
            logger.info("a lane waits for a node with %s free", self._request.bundle)
            self._require_capacity()

    def _require_capacity(self) -> None:
        """Others may be at work; where none is, and nothing comes, this cannot go on for ever."""
        if self._placed or self._unplaced_since is None:
            return
        waited_seconds = time.monotonic() - self._unplaced_since
        if waited_seconds >= _NO_CAPACITY_SECONDS:
            needed = f"no node with {self._request.bundle} free for {waited_seconds / 60:.0f} minutes"
            self._fail(SystemFailure(f"all lanes are lost, and there was {needed}"))

    async def _live(self, index: int) -> bool:
        """One lane from its placement to its end; -> whether anything was committed meanwhile.

        Raises:
            LANE_DEAD: it did not come up.
        """
        group = placement_group([self._request.bundle])
        lane: _Lane | None = None
        actors: list[Any] = []
        committed = self._progress.num_committed
        try:
            await self._wait_for_place(group)
            self._placed.add(index)
            failpoint("driver.before-lane")
            lane = await self._start(index, group, actors)
            self._up.add(index)
            with contextlib.suppress(*LANE_DEAD):
                await self._feed(lane)
            self._progress.num_lost_lanes += not self._finished.is_set()
            return self._progress.num_committed > committed
        finally:
            self._up.discard(index)
            self._placed.discard(index)
            self._unplaced_since = time.monotonic()
            await self._bury(lane, group, actors)
            self._progress.lanes.pop(index, None)

    async def _start(self, index: int, group: Any, actors: list[Any]) -> _Lane:
        placed = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        common: dict[str, Any] = {
            "num_cpus": 0,
            "scheduling_strategy": placed,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        encoder_class: Any = ray.remote(EncoderActor)
        decoder_class: Any = ray.remote(DecoderActor)
        encoder = encoder_class.options(**common, num_gpus=self._request.encoder_gpus, max_concurrency=64).remote(
            self._settings
        )
        actors.append(encoder)
        decoder = decoder_class.options(**common, num_gpus=self._request.decoder_gpus, max_concurrency=1000).remote(
            self._settings, self._version, encoder
        )
        actors.append(decoder)
        await encoder.ready.remote()  # an encoder that cannot start must not count against a shard
        pid = await decoder.ready.remote()
        logger.info("lane %d is up: decoder process %d", index, pid)
        return _Lane(index=index, decoder=decoder)

    async def _feed(self, lane: _Lane) -> None:
        """Give the lane its next shard only when it has room for it."""
        while not lane.dead and not self._finished.is_set():
            report: LaneReport = await lane.decoder.report.remote(wait_seconds=_REPORT_SECONDS)
            self._progress.lanes[lane.index] = report
            self._watch(report.shards)
            task = self._next_for(lane) if report.has_room else None
            if task is None:
                await asyncio.sleep(_IDLE_SECONDS)
                continue
            name = _SUSPECT if task.case.is_suspect else "shard"
            lane.open[task.shard.id] = asyncio.create_task(self._do(lane, task), name=name)
            await asyncio.sleep(0)

    def _next_for(self, lane: _Lane) -> _Task | None:
        """The next shard this lane may have. A suspect is alone with a lane: then a death can only be its own."""
        if not self._todo or any(task.get_name() == _SUSPECT for task in lane.open.values()):
            return None
        if self._todo[0].case.is_suspect and lane.open:
            return None
        if len(lane.open) >= self._fair_share():
            return None
        return self._todo.popleft()

    def _fair_share(self) -> int:
        """Open shards of one lane at most, so that the first lane up does not take what others could do."""
        gathering = time.monotonic() - self._begun < _GATHERING_SECONDS
        num_lanes = self._num_lanes if gathering else max(1, len(self._up))
        return max(1, -(-self._num_left // num_lanes))

    async def _do(self, lane: _Lane, task: _Task) -> None:
        shard_id = task.shard.id
        self._num_open += 1
        try:
            await self._transcribe(lane, task)
        except (*LANE_DEAD, ModelFailure) as error:
            lane.dead = True
            await self._crashed(lane, task, error)
        except Superseded as error:
            self._fail(Superseded(_reason(error)))
        except Exception as error:  # noqa: BLE001  (whatever it is, this shard must be done again or end the run)
            lane.dead = lane.given_up = True  # its engine may be beyond use, and a fresh one costs little
            self._erred(task, error)
        finally:
            lane.open.pop(shard_id, None)
            self._alarm.forget(shard_id)
            self._num_open -= 1
            if self._stopping and not self._num_open:
                self._finished.set()

    async def _transcribe(self, lane: _Lane, task: _Task) -> None:
        """Lead a lane through one shard."""
        case, decoder = task.case, lane.decoder
        shard = await asyncio.to_thread(self._load_shard, task.shard)
        order = Order(shard=shard, culprits=case.culprits, retry_codes=self._retry_codes)
        failpoint("driver.before-begin")
        ids: tuple[str, ...] = await decoder.begin.remote(order)
        *groups, last = case.groups(ids) or [()]
        for group in groups:
            await self._do_group(decoder, task, group)
        report = await self._do_group(decoder, task, last)
        self._watch([report])
        if self._fatal is None:
            failpoint("driver.before-commit")
            summary: PartSummary = await decoder.commit.remote(task.shard.id)
            failpoint("driver.after-commit")
            if case.deaths:
                await self._remember(self._journal.close, case)
            self._committed(summary, report)

    async def _do_group(self, decoder: Any, task: _Task, group: tuple[str, ...]) -> ShardReport:
        """Have some inputs done; -> how far the shard is then."""
        task.in_hand = group if task.case.is_suspect else ()
        report: ShardReport = await decoder.transcribe.remote(task.shard.id, group)
        task.in_hand = ()
        task.case.cleared |= frozenset(group)
        return report

    def _watch(self, reports: Sequence[ShardReport]) -> None:
        """Stop everything when too much goes wrong; called before any of it is committed."""
        for report in reports:
            self._alarm.saw(report)
        try:
            self._alarm.check()
        except SystemFailure as error:
            self._fail(error)

    def _committed(self, summary: PartSummary, report: ShardReport) -> None:
        self._failed_starts = 0
        self._alarm.settle(summary.shard_id)
        if summary.created:
            self._progress.num_shards += 1
            self._progress.num_committed += report.num_finished
            self._progress.num_errors += report.num_errors
            self._progress.audio_seconds += report.audio_seconds
        else:  # somebody else's work
            self._progress.num_committed += summary.num_rows
        self._num_left -= 1
        if self._num_left <= 0:
            self._finished.set()

    async def _crashed(self, lane: _Lane, task: _Task, error: Exception) -> None:
        """The lane died with this shard in its hands: learn from it, queue the shard again."""
        if self._finished.is_set() or self._stopping:
            return  # the machines are being taken away, or we end the lanes ourselves
        if lane.given_up:
            self._again(task)
            return
        died = not isinstance(error, ModelFailure)
        detail = type(error).__name__ if died else _reason(error)
        told = task.case.died(task.in_hand, died=died, detail=detail)
        task.in_hand = ()
        logger.warning("shard %s lost its lane (%s), time %d", task.shard.id, type(error).__name__, task.case.deaths)
        await self._remember(self._journal.write, task.case)
        task.fruitless = 0 if told else task.fruitless + 1
        if task.fruitless >= _MAX_FRUITLESS:
            self._fail(SystemFailure(f"shard {task.shard.id} lost its lane {task.case.deaths} times; see the Ray logs"))
            return
        self._again(task)

    async def _remember(self, write: Callable[[Case], None], case: Case) -> None:
        """A journal that cannot be written saves no lanes later; nothing else is lost."""
        try:
            await asyncio.to_thread(write, case)
        except OSError as error:
            logger.warning("the journal of shard %s could not be written: %s", case.shard_id, error)

    def _erred(self, task: _Task, error: Exception) -> None:
        task.errors += 1
        logger.warning("shard %s failed, time %d: %s", task.shard.id, task.errors, _reason(error))
        if task.errors >= _MAX_ERRORS:
            reason = _reason(error)
            self._fail(SystemFailure(f"shard {task.shard.id} failed {task.errors} times; the last one: {reason}"))
            return
        self._again(task)

    def _again(self, task: _Task) -> None:
        if not self._stopping:
            # Suspects come last, so that the healthy are not held up.
            (self._todo.append if task.case.is_suspect else self._todo.appendleft)(task)

    def _fail(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        self._finished.set()

    async def _bury(self, lane: _Lane | None, group: Any, actors: list[Any]) -> None:
        """Let the open shards hear of the death, then free what the lane held."""
        for actor in reversed(actors):
            with contextlib.suppress(*LANE_DEAD, GetTimeoutError):
                ray.kill(actor)
        if lane is not None and lane.open and not self._finished.is_set():
            await asyncio.wait(list(lane.open.values()), timeout=30)
        remove_placement_group(group)


def _reason(error: Exception) -> str:
    """What an actor died of or raised, without the tracebacks that Ray puts around it."""
    lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
