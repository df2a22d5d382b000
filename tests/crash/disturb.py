"""One disturbed run: the attempts of a schedule, the command repeated in peace, and what the oracle says."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import failpoints
from pipeline.storage import Storage, join
from tests.crash.forks import Forked
from tests.crash.oracle import CRASHED, Reader, Rows, by_id, num_crashed, problems_of, read_rows
from tests.crash.schedule import OTHER_SETTINGS, Attempt, Schedule, Strike
from tests.crash.world import Place, World, wait_for
from tests.processes import actors

_ATTEMPT_SECONDS = 90.0  # nothing that is injected takes longer; what does, hangs
_MAX_REPEATS = 5
_LOOK_SECONDS = 0.25
_POLL_SECONDS = 0.03
_AFTER_PAUSE_SECONDS = 0.3
# SIGTERM by itself: before the command can handle it, or when it has said its last word.
_MAY_END = {0, 1, 3, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
_NOT_FETCHED = 3  # inputs without audio in the story `retry`


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the world's inputs come to, undisturbed, and outputs to begin with."""

    rows: Rows
    complete: Path  # made with `OTHER_SETTINGS`
    with_errors: Path  # some inputs could not be fetched


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How a disturbed run went."""

    name: str
    problems: list[str] = field(default_factory=list[str])
    codes: list[int | None] = field(default_factory=list[int | None])  # of the attempts and repeats; None: stopped
    struck: list[str] = field(default_factory=list[str])
    num_looks: int = 0
    num_blamed: int = 0  # rows that blamed an input, before they were retried
    seconds: float = 0.0

    @property
    def is_ok(self) -> bool:
        return not self.problems


@dataclass(slots=True)
class _Stopped:
    """A driver that stands still, or waits for something of its own that does."""

    process: Forked
    pids: list[int]
    begun: float


def prepare(world: World) -> Expected:
    """Run undisturbed, once per world."""
    rows = by_id(read_rows(_undisturbed(world, "expected")))
    complete = _undisturbed(world, "complete", overrides=OTHER_SETTINGS)
    with_errors = world.place("with-errors", on_s3=False)
    _must_end(with_errors, world.begin(with_errors, verb="plan"))
    hidden = sorted(world.inputs.glob("0*"))[:_NOT_FETCHED]
    for path in hidden:
        path.rename(world.folder / path.name)
    _must_end(with_errors, world.begin(with_errors))
    for path in hidden:
        (world.folder / path.name).rename(path)
    return Expected(rows=rows, complete=Path(complete.output_uri), with_errors=Path(with_errors.output_uri))


def disturb(world: World, schedule: Schedule, expected: Expected, *, keep: bool = False) -> Outcome:
    """Do what a schedule says. The folder of the run is removed if all is well, unless it is to be kept."""
    begun = time.monotonic()
    place = world.place(schedule.name, on_s3=schedule.on_s3)
    run = _Run(world, schedule, expected, place)
    try:
        run.do()
    finally:
        run.end()
    outcome = run.outcome
    outcome.seconds = round(time.monotonic() - begun, 2)
    if outcome.is_ok and not keep:
        shutil.rmtree(place.folder, ignore_errors=True)  # somebody who was stopped may still be at it
    elif not outcome.is_ok:
        outcome.problems.append(f"the log is {place.folder / 'log'}")
    return outcome


class _Run:
    def __init__(self, world: World, schedule: Schedule, expected: Expected, place: Place) -> None:
        self._world, self._schedule, self._expected, self._place = world, schedule, expected, place
        self._reader = Reader(place)
        self._rng = random.Random(schedule.name)
        self._stopped: list[_Stopped] = []
        self._known_pauses: set[str] = set()
        self._next_look = 0.0
        self.outcome = Outcome(name=schedule.name)

    def do(self) -> None:
        self._begin_story()
        code = None
        for number, attempt in enumerate(self._schedule.attempts):
            code = self._attempt(attempt, is_first=number == 0)
            self._heal(attempt)
        is_complete = code in (0, 1) and not (
            self._schedule.story == "superseded" and len(self._schedule.attempts) == 1
        )
        if not is_complete:
            self._repeat()
        self._resume(force=True)
        for stopped in self._stopped:
            self._wait(stopped.process, attempt=None)
        self._stopped.clear()
        self._check()

    def end(self) -> None:
        """Leave nothing behind that could disturb the next run."""
        self._heal(Attempt())
        for stopped in self._stopped:
            _signal([*stopped.pids, stopped.process.pid], signal.SIGCONT)
            _signal([stopped.process.pid], signal.SIGKILL)

    def _heal(self, attempt: Attempt) -> None:
        """No more faults of S3; note which of them came to pass."""
        if self._world.proxy is None:
            return
        for planned, left in zip(attempt.s3, self._world.proxy.faults, strict=False):
            if left.times < planned.times:
                self.outcome.struck.append(f"s3 {planned.kind}")
        self._world.proxy.heal()

    def _begin_story(self) -> None:
        begin = {"retry": self._expected.with_errors, "new-version": self._expected.complete}.get(self._schedule.story)
        if begin is None:
            return
        storage = Storage(self._place.direct_options)
        for path in begin.rglob("*"):
            if path.is_file():
                storage.create(join(self._place.output_uri, path.relative_to(begin).as_posix()), path.read_bytes())

    def _options(self, *, is_first: bool) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        """Of the command, and of its config."""
        match self._schedule.story:
            case "retry":
                return ("--retry-errors", "NOT_FOUND"), {}
            case "new-version":
                return ("--new-version",), {}
            case "superseded":
                return ((), OTHER_SETTINGS) if is_first else (("--new-version",), {})
            case "fresh":
                return (), {}

    def _attempt(self, attempt: Attempt, *, is_first: bool) -> int | None:
        options, overrides = self._options(is_first=is_first)
        if self._world.proxy is not None and self._schedule.on_s3:
            for fault in attempt.s3:
                self._world.proxy.fail(
                    fault.kind, times=fault.times, method=fault.method, path=fault.path, num_bytes=fault.num_bytes
                )
        process = self._world.begin(
            self._place,
            *options,
            failpoints_text=attempt.failpoints,
            overrides={**overrides, "ray.lanes": attempt.lanes},
        )
        return self._wait(process, attempt=attempt)

    def _repeat(self) -> None:
        options, overrides = self._options(is_first=False)
        for _ in range(_MAX_REPEATS):
            code = self._wait(self._world.begin(self._place, *options, overrides=overrides), attempt=None)
            if code in (0, 1):
                return
        self.outcome.problems.append(f"still not complete after {_MAX_REPEATS} repeats")

    def _check(self) -> None:
        outcome = self.outcome
        outcome.num_blamed = num_crashed(read_rows(self._place)) if not self._reader.problems else 0
        if outcome.num_blamed and self._schedule.may_convict:
            process = self._world.begin(self._place, "--retry-errors", ",".join(CRASHED))
            self._wait(process, attempt=None)
        self._reader.look()
        outcome.num_looks = self._reader.num_looks
        outcome.problems += [*sorted(self._reader.problems), *problems_of(self._place, self._expected.rows)]
        outcome.struck += sorted(failpoints.struck(self._place.scratch))
        lines = (self._place.folder / "log").read_text(errors="replace").splitlines()
        outcome.problems += [
            line for line in lines if "not an error we expected" in line and failpoints.Injected.__name__ not in line
        ]

    def _wait(self, process: Forked, *, attempt: Attempt | None) -> int | None:
        """Until it ends, or stands still; strike meanwhile. -> its exit code."""
        begun = time.monotonic()
        strikes = sorted(attempt.strikes, key=lambda strike: strike.after_seconds) if attempt else []
        while (code := process.poll()) is None:
            seconds = time.monotonic() - begun
            if seconds > _ATTEMPT_SECONDS:
                self.outcome.problems.append(f"an attempt hangs: process {process.pid} after {seconds:.0f} s")
                _signal([process.pid], signal.SIGKILL)
            if strikes and seconds >= strikes[0].after_seconds and self._strike(strikes[0], process):
                strikes.pop(0)
            if self._has_stopped(process):
                self.outcome.codes.append(None)
                return None
            if self._stopped and seconds >= (self._schedule.resume_seconds or _ATTEMPT_SECONDS):
                self._resume(force=False)
            self._look()
            time.sleep(_POLL_SECONDS)
        self.outcome.codes.append(code)
        may_be_refused = attempt is not None or self._schedule.story == "superseded"
        if code not in _MAY_END and not (code == 2 and may_be_refused):
            self.outcome.problems.append(f"exit code {code}")
        return code

    def _look(self) -> None:
        if time.monotonic() >= self._next_look:
            self._reader.look()
            self._next_look = time.monotonic() + _LOOK_SECONDS * (4 if self._schedule.on_s3 else 1)

    def _strike(self, strike: Strike, process: Forked) -> bool:
        """-> whether the victim was there."""
        number = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}[strike.signal]
        if strike.victim == "node":
            self._world.kill_node()
            self.outcome.struck.append("node:KILL")
            return True
        victims = [process.pid] if strike.victim == "driver" else actors(strike.victim, root=self._world.forks_pid)
        if not victims:
            return False
        victim = self._rng.choice(victims)
        _signal([victim], number)
        self.outcome.struck.append(f"{strike.victim}:{strike.signal}")
        if strike.signal == "STOP":
            self._stopped.append(_Stopped(process, [victim], time.monotonic()))
        return True

    def _has_stopped(self, process: Forked) -> bool:
        """Whether something of this attempt stands still, so that it will not end by itself."""
        for name, pid in failpoints.struck(self._place.scratch).items():
            if ":pause@" in name and name not in self._known_pauses and _state(pid) == "T":
                self._known_pauses.add(name)
                self._stopped.append(_Stopped(process, [pid], time.monotonic()))
        mine = [stopped for stopped in self._stopped if stopped.process is process]
        return bool(mine) and time.monotonic() - mine[0].begun > _AFTER_PAUSE_SECONDS

    def _resume(self, *, force: bool) -> None:
        for stopped in self._stopped:
            if force or self._schedule.resume_seconds is not None:
                _signal(stopped.pids, signal.SIGCONT)


def _undisturbed(world: World, name: str, *, overrides: Mapping[str, Any] | None = None) -> Place:
    place = world.place(name, on_s3=False)
    _must_end(place, world.begin(place, overrides=overrides))
    return place


def _must_end(place: Place, process: Forked) -> None:
    code = wait_for(process, seconds=_ATTEMPT_SECONDS)
    if code not in (0, 1):
        log = (place.folder / "log").read_text()
        raise RuntimeError(f"an undisturbed command ended with {code}; the end of its log:\n{log[-2000:]}")


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
