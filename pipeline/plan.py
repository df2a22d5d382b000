"""Inputs -> shards -> manifests on storage that are never rewritten; which shards remain.

    OUTPUT/_kikitori/manifest/plan-00000.manifest   the first 100,000 inputs
    OUTPUT/_kikitori/manifest/plan-00001.manifest   the next ones, or those that were new when the command was repeated

They are Parquet, by another name: who reads an output recursively must find its parts and nothing else.

A plan is the union of its manifests. Inputs are taken as they are listed, window by window, and each window is cut into
shards and written before the next is looked at: what the planner holds does not grow with the corpus, but for 16 bytes
per input and a line per shard. A planner that dies leaves whole windows, and the next one goes on from there.

Each manifest is written create-only under the next number, so of two planners working at the same time one loses, reads
what the other wrote, and adds only what is still missing: no input is planned twice.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath

from pipeline.config import RunConfig
from pipeline.discover import Found, Search
from pipeline.errors import ConfigError, SystemFailure
from pipeline.estimate import estimate_seconds
from pipeline.failpoints import failpoint
from pipeline.known_ids import KnownIds
from pipeline.manifests import read_listing, refs_of, to_parquet
from pipeline.messages import ShardRef
from pipeline.shards import cut_shards
from pipeline.storage import Storage, join
from pipeline.write import part_uri

_WINDOW_INPUTS = 100_000  # some 120 MB while it is cut, and 300 shards of an hour: enough to sort by length
_LISTED_INPUTS = 10_000  # looked up at a time
_MAX_PLANNERS = 8  # losing to this many others in a row means that the storage is lying about what exists
_MANIFEST_NAME = re.compile(r"plan-(\d{5,})\.manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to be done for one output, the longest inputs first, whatever is done of it already."""

    shards: tuple[ShardRef, ...]
    ignored: Mapping[str, int] = field(default_factory=dict[str, int])  # as in `Search`; empty when read back

    @property
    def num_inputs(self) -> int:
        return sum(shard.num_inputs for shard in self.shards)

    @property
    def estimated_seconds(self) -> float:
        """Of audio; an estimate from headers and sizes, nothing was decoded for it."""
        return math.fsum(shard.estimated_seconds for shard in self.shards)


def make_plan(config: RunConfig, input_storage: Storage, output_storage: Storage) -> Plan:
    """List the inputs and plan those that are not planned yet; what was planned before stays exactly as it is.

    Raises:
        ConfigError: as `Search`, or the output is not set or not writable.
        SystemFailure: a manifest on storage is damaged, or storage does not keep what it was given.
    """
    output_uri = config.output.uri
    if not output_uri:
        raise ConfigError("output.uri is not set; name the folder that the transcripts go to")
    output_storage = output_storage.probe(output_uri)
    search = Search(config.input.uris, input_storage, output_uri=output_uri)
    ledger = _Ledger(output_uri, output_storage)
    ledger.catch_up()
    for window in _windows(search, ledger.known):
        ledger.add(window, input_storage, shard_audio_hours=config.input.shard_audio_hours)
        window.clear()  # or it would live until the next one is full
    return Plan(shards=_longest_first(ledger.shards), ignored=search.ignored)


def read_plan(output_uri: str, storage: Storage) -> Plan:
    """The plan as it was written, from the output alone.

    Raises:
        ConfigError: there is none.
        SystemFailure: a manifest is damaged.
    """
    manifests = _manifests(output_uri, storage)
    if not manifests:
        raise ConfigError(f"no plan in {_manifest_folder(output_uri)}; run `kikitori plan` or `kikitori run` first")
    listings = (read_listing(manifests[number], storage, with_ids=False) for number in sorted(manifests))
    shards = [shard for listing in listings for shard in listing.shards]
    _require_once(shards)
    return Plan(shards=_longest_first(shards))


def committed(output_uri: str, storage: Storage) -> set[str]:
    """The ids of the shards whose part is there, from one listing."""
    folder, _, name = part_uri(output_uri, "*").rpartition("/")
    if not storage.is_folder(folder):
        return set()
    prefix, suffix = name.split("*")
    names = (PurePosixPath(entry.uri).name for entry in storage.list_files(folder))
    return {name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix)}


def remaining(plan: Plan, committed_ids: set[str]) -> tuple[ShardRef, ...]:
    """The shards still to be done, in the order of the plan."""
    return tuple(shard for shard in plan.shards if shard.id not in committed_ids)


class _Ledger:
    """The manifests of an output: what they hold, and how something is added."""

    def __init__(self, output_uri: str, storage: Storage) -> None:
        self.known = KnownIds()
        self.shards: list[ShardRef] = []
        self._output_uri = output_uri
        self._storage = storage
        self._read: set[int] = set()

    def catch_up(self) -> None:
        """Read the manifests that are there and were not read yet."""
        manifests = _manifests(self._output_uri, self._storage)
        for number in sorted(manifests.keys() - self._read):
            listing = read_listing(manifests[number], self._storage, with_ids=True)
            num_twice = int(self.known.holds(listing.ids).sum()) + len(listing.ids) - len(set(listing.ids))
            if num_twice:
                raise SystemFailure(
                    f"{manifests[number]}: {num_twice} inputs are planned twice; was a manifest copied?"
                )
            self._accept(number, listing.shards, listing.ids)

    def add(self, window: Sequence[Found], input_storage: Storage, *, shard_audio_hours: float) -> None:
        """Plan what is new in a window, under the next number that nobody else has taken."""
        for _ in range(_MAX_PLANNERS):
            is_known = self.known.holds([one.source.id for one in window])
            window = [one for one, known in zip(window, is_known.tolist(), strict=True) if not known]
            if not window:
                return
            number = max(self._read, default=-1) + 1
            if self._write(number, window, input_storage, shard_audio_hours=shard_audio_hours):
                return
            self.catch_up()
        folder = _manifest_folder(self._output_uri)
        raise SystemFailure(f"{folder}: a new manifest is refused, as if it were there, and is not")

    def _write(self, number: int, window: Sequence[Found], storage: Storage, *, shard_audio_hours: float) -> bool:
        """-> whether it was this planner who wrote that manifest."""
        estimated = estimate_seconds(window, storage)
        seconds = {one.source.id: told for one, told in zip(window, estimated, strict=True)}
        shards = cut_shards(
            ((one.source, seconds[one.source.id]) for one in window), shard_audio_hours=shard_audio_hours
        )
        data = to_parquet(shards, seconds=seconds, versions={one.source.id: one.version for one in window})
        uri = join(_manifest_folder(self._output_uri), f"plan-{number:05d}.manifest")
        failpoint("plan.before-manifest")
        if not self._storage.create(uri, data):
            return False
        failpoint("plan.after-manifest")
        self._accept(number, refs_of(shards, uri, seconds=seconds), list(seconds))
        return True

    def _accept(self, number: int, shards: Iterable[ShardRef], ids: Sequence[str]) -> None:
        self._read.add(number)
        self.shards.extend(shards)
        self.known.add(ids)


def _windows(search: Iterable[Found], known: KnownIds) -> Iterator[list[Found]]:
    """The inputs that are not known, each once; `known` grows while windows are taken."""
    listed = iter(search)
    new: dict[str, Found] = {}
    while some := list(islice(listed, _LISTED_INPUTS)):
        is_known = known.holds([one.source.id for one in some])
        new.update((one.source.id, one) for one, there in zip(some, is_known.tolist(), strict=True) if not there)
        if len(new) >= _WINDOW_INPUTS:
            window, new = list(new.values()), {}
            yield window
    if new:
        yield list(new.values())


def _longest_first(shards: Iterable[ShardRef]) -> tuple[ShardRef, ...]:
    # The longest file bounds how early a run can end, whatever the number of machines: it has to start first.
    return tuple(sorted(shards, key=lambda shard: (-shard.longest_seconds, shard.id)))


def _require_once(shards: Sequence[ShardRef]) -> None:
    num_twice = len(shards) - len({shard.id for shard in shards})
    if num_twice:
        raise SystemFailure(f"{num_twice} shards are planned twice, their inputs too; was a manifest copied here?")


def _manifest_folder(output_uri: str) -> str:
    return join(output_uri, "_kikitori", "manifest")


def _manifests(output_uri: str, storage: Storage) -> dict[int, str]:
    """The URIs of the manifests by their number."""
    folder = _manifest_folder(output_uri)
    uris = [entry.uri for entry in storage.list_files(folder)] if storage.is_folder(folder) else []
    matches = ((_MANIFEST_NAME.fullmatch(PurePosixPath(uri).name), uri) for uri in uris)
    return {int(match[1]): uri for match, uri in matches if match}
