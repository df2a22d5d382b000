"""How far an output is, from storage alone: the plan, the parts that are there, and what their footers say."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipeline.messages import ShardRef
from pipeline.plan import Plan, committed, remaining
from pipeline.storage import Storage
from pipeline.versions import Version, read_versions
from pipeline.write import PartSummary, part_uri, read_summary

_NUM_THREADS = 16  # footers are small reads; the wait is the store's


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionParts:
    """A version of the settings, and how many parts are of it now."""

    number: int
    config_fingerprint: str
    num_parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of an output."""

    num_inputs: int
    num_shards: int
    num_committed_shards: int  # with the settings in force
    num_outdated_shards: int  # whose part was made with earlier settings; they remain to be done again
    num_rows: int
    num_ok: int
    errors: Mapping[str, int]  # code -> rows
    audio_seconds: float  # of the rows that are ok
    remaining_seconds: float  # estimated
    versions: tuple[VersionParts, ...]  # oldest first; the last is in force
    is_counted: bool = True  # False: no footer was read, and only inputs and shards are known

    @property
    def num_errors(self) -> int:
        """Rows that are errors."""
        return sum(self.errors.values())

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the plan is committed with the settings in force."""
        return self.is_counted and self.num_committed_shards == self.num_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do."""

    shards: tuple[ShardRef, ...]  # in the order of the plan
    num_inputs: int
    estimated_seconds: float


def status_of(plan: Plan, output_uri: str, storage: Storage) -> Status:
    """Count what is committed of a plan.

    Raises:
        SystemFailure: a part's footer or a record of settings cannot be read.
    """
    versions = read_versions(output_uri, storage)
    there = committed(output_uri, storage)
    parts = _summaries([shard.id for shard in plan.shards if shard.id in there], output_uri, storage)
    outdated = {part.shard_id for part in parts if _is_outdated(part, versions)}
    todo = remaining(plan, there - outdated)
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part.errors)
    return Status(
        num_inputs=plan.num_inputs,
        num_shards=len(plan.shards),
        num_committed_shards=len(parts) - len(outdated),
        num_outdated_shards=len(outdated),
        num_rows=sum(part.num_rows for part in parts),
        num_ok=sum(part.num_ok for part in parts),
        errors=dict(sorted(errors.items())),
        audio_seconds=sum(part.audio_seconds for part in parts),
        remaining_seconds=sum(shard.estimated_seconds for shard in todo),
        versions=tuple(_count(version, versions, parts) for version in versions),
    )


def quick_status_of(plan: Plan, output_uri: str, storage: Storage) -> Status:
    """The same where time is short: from one listing, as if all parts were made with the settings in force."""
    there = committed(output_uri, storage)
    todo = remaining(plan, there)
    return Status(
        num_inputs=plan.num_inputs,
        num_shards=len(plan.shards),
        num_committed_shards=len(plan.shards) - len(todo),
        num_outdated_shards=0,
        num_rows=0,
        num_ok=0,
        errors={},
        audio_seconds=0.0,
        remaining_seconds=sum(shard.estimated_seconds for shard in todo),
        versions=(),
        is_counted=False,
    )


def work_of(
    plan: Plan,
    output_uri: str,
    storage: Storage,
    *,
    versions: Sequence[Version] = (),
    retry_codes: Collection[str] = (),
) -> Work:
    """What remains of a plan: one listing, and footers only where they matter.

    Args:
        plan: everything.
        output_uri: of the output.
        storage: where it is.
        versions: of the settings, the last one in force; parts of another one are to be done again.
        retry_codes: inputs whose rows carry one of these error codes are to be done again.

    Raises:
        SystemFailure: a part's footer cannot be read.
    """
    done = committed(output_uri, storage)
    again: dict[str, int] = {}  # shard -> inputs, of the parts that are there
    if len(versions) > 1 or retry_codes:
        parts = _summaries([shard.id for shard in plan.shards if shard.id in done], output_uri, storage)
        again = {part.shard_id: _to_do_again(part, versions, retry_codes) for part in parts}
    shards = [(shard, again.get(shard.id, 0)) for shard in plan.shards if shard.id not in done or again.get(shard.id)]
    return Work(
        shards=tuple(shard for shard, _ in shards),
        num_inputs=sum(count or shard.num_inputs for shard, count in shards),
        estimated_seconds=sum(
            shard.estimated_seconds * (count or shard.num_inputs) / shard.num_inputs for shard, count in shards
        ),
    )


def _to_do_again(part: PartSummary, versions: Sequence[Version], retry_codes: Collection[str]) -> int:
    if _is_outdated(part, versions):
        return part.num_rows
    return sum(count for code, count in part.errors.items() if code in retry_codes)


def _is_outdated(part: PartSummary, versions: Sequence[Version]) -> bool:
    # With one version nothing can be outdated, so that a plain resume need not look, and all verbs say the same.
    return len(versions) > 1 and not versions[-1].made(part)


def _count(version: Version, versions: Sequence[Version], parts: Iterable[PartSummary]) -> VersionParts:
    if version is versions[-1]:
        num_parts = sum(not _is_outdated(part, versions) for part in parts)
    else:  # settings that came into force again count once, as the later version
        came_again = any(later.settings == version.settings for later in versions if later.number > version.number)
        num_parts = 0 if came_again else sum(version.made(part) for part in parts)
    return VersionParts(number=version.number, config_fingerprint=version.config_fingerprint, num_parts=num_parts)


def _summaries(shard_ids: Sequence[str], output_uri: str, storage: Storage) -> list[PartSummary]:
    uris = [part_uri(output_uri, shard_id) for shard_id in shard_ids]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(partial(read_summary, storage), uris))
