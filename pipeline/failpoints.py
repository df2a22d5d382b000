"""Places where a test may kill, stop, break or delay a process: at every numbered step, on both sides of every effect.

    KIKITORI_FAILPOINTS="write.before-put:kill@3,journal.after-write:raise"
    KIKITORI_FAILPOINTS_FOLDER=/some/folder

The first means: whichever process comes third to `write.before-put` kills itself there. Hits are counted over all
processes that share the folder, by files in it that only one of them can create; without a folder each process counts
for itself. Nothing is armed by default, and a place that is not armed costs one comparison.
"""

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.errors import ConfigError

PLACES: Mapping[str, str] = MappingProxyType(
    {
        "plan.before-manifest": "the shards of a window are cut, its manifest is not written",
        "plan.after-manifest": "the manifest is on storage, nothing else is",
        "settings.before-record": "the settings are known, not recorded",
        "settings.after-record": "they are recorded, the config is not yet beside them",
        "driver.before-lane": "a lane has its place and no process",
        "loader.before-ready": "the process of a loader is there, its constructor runs",
        "encoder.before-ready": "the encoder has its weights, no loader yet",
        "decoder.before-ready": "the decoder has its weights, nobody was told",
        "driver.before-begin": "a shard was given to a lane, which does not know",
        "driver.before-commit": "all inputs of a shard are done, its lane is not told to commit",
        "driver.after-commit": "its part is on storage, and the driver has just heard of it",
        "journal.before-write": "a lane is lost, and nothing is written about it",
        "journal.after-write": "what it teaches is written",
        "journal.before-close": "a shard with a case is committed, its case not closed",
        "load.before-open": "an input is next, not opened",
        "load.mid-stream": "a piece of its waveform is made, not handed on",
        "encode.before-piece": "a piece of waveform has come, not encoded",
        "encode.after-piece": "its codes are made, not handed on",
        "generate.before-accept": "a piece of codes has come, not taken in",
        "generate.before-pass": "between two passes, streams half-way in their slots",
        "generate.before-finish": "the last token of a stream is there, the stream not handed on",
        "align.before-words": "the tokens of a stream are complete, its words not made",
        "commit.before-check": "all rows of a shard can be made, nobody has looked whether newer settings are in force",
        "write.before-put": "the bytes of a part are made, not put",
        "write.after-put": "the part is on storage, nobody was told",
        "write.before-archive": "a part of older settings is there, not copied",
        "write.before-replace": "it is copied to the archive, not replaced",
        "write.after-replace": "it is replaced, nobody was told",
        "write.before-amend": "error rows are done again, the part not replaced",
        "write.after-amend": "it is replaced, nobody was told",
        "local.before-write": "a temporary file is open and empty",
        "local.before-publish": "it is complete and on disk, without its name",
        "local.after-publish": "it has its name, and still its temporary one",
    }
)
VARIABLE, FOLDER_VARIABLE = "KIKITORI_FAILPOINTS", "KIKITORI_FAILPOINTS_FOLDER"
_ORDER = re.compile(r"([\w.-]+|\*):(kill|pause|raise|full|sleep|note)(?:=([\d.]+))?(?:@(\d+)(?:-(\d+))?)?")
_EVERY = "*"  # with `note`: which places are there at all


class Injected(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do at one place: kill -9, SIGSTOP, raise, pretend that the disk is full, sleep, or only take a note."""

    place: str
    action: str
    seconds: float  # of sleep
    first: int  # hit, counted from 1
    last: int


def parse(text: str) -> tuple[Order, ...]:
    """`PLACE:ACTION[=SECONDS][@HIT[-HIT]],...`; without a hit, the first one.

    Raises:
        ConfigError: not of that form, or no such place.
    """
    return tuple(_order(part.strip()) for part in text.split(",") if part.strip())


def arm(environment: Mapping[str, str]) -> None:
    """Do from now on what this environment says; raises ConfigError as `parse`."""
    global _armed
    orders = parse(environment.get(VARIABLE, ""))
    folder = environment.get(FOLDER_VARIABLE)
    _armed = _Armed(orders, Path(folder) if folder else None) if orders else None


def failpoint(place: str) -> None:
    """Here, the process may be made to fail."""
    if _armed is not None:
        _armed.reached(place)


def struck(folder: Path) -> dict[str, int]:
    """What has happened, by the name `PLACE:ACTION@HIT`: which process it happened to."""
    found = {path.name.removeprefix("struck "): path for path in folder.glob("struck *")}
    return {name: int(path.read_text() or 0) for name, path in found.items()}


class _Armed:
    def __init__(self, orders: Iterable[Order], folder: Path | None) -> None:
        self._orders = tuple(orders)
        self._folder = folder
        self._last = {order.place: max(o.last for o in self._orders if o.place == order.place) for order in orders}
        self._counts: Counter[str] = Counter()

    def reached(self, place: str) -> None:
        assert place in PLACES, place
        if self._counts[place] >= self._last.get(place, self._last.get(_EVERY, 0)):
            return
        hit = self._count(place)
        for order in self._orders:
            if order.place in (place, _EVERY) and order.first <= hit <= order.last:
                self._do(order, f"{place}:{order.action}@{hit}")

    def _count(self, place: str) -> int:
        """The number of this hit. Another process may have had some of the numbers since ours."""
        while True:
            self._counts[place] += 1
            if self._folder is None or _create(self._folder / f"hit {place}@{self._counts[place]}"):
                return self._counts[place]

    def _do(self, order: Order, name: str) -> None:
        if self._folder is not None and order.action != "note":
            _create(self._folder / f"struck {name}")
        match order.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "pause":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise Injected(name)
            case "full":
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({name})")
            case "sleep":
                time.sleep(order.seconds)
            case _:
                pass


def _order(text: str) -> Order:
    match = _ORDER.fullmatch(text)
    if match is None:
        raise ConfigError(f"{VARIABLE}: found {text!r}; expected PLACE:ACTION@HIT, such as write.before-put:kill@3")
    place, action, seconds, first, last = match.groups()
    if place not in PLACES and (place, action) != (_EVERY, "note"):
        raise ConfigError(f"{VARIABLE}: there is no place {place!r}; the places are {', '.join(PLACES)}")
    begin = int(first or 1)
    end = int(last or (first or (1_000_000 if action == "note" else 1)))
    return Order(place=place, action=action, seconds=float(seconds or 1), first=begin, last=end)


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    return True


_armed: _Armed | None = None
arm(os.environ)
