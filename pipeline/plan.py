"""Sources -> shards -> a manifest on storage that is never rewritten; which shards remain.

    OUTPUT/_kikitori/manifest/plan-00000.parquet   the first plan
    OUTPUT/_kikitori/manifest/plan-00001.parquet   inputs which were new when the command was repeated, and so on

A plan is the union of its manifests. Each is written create-only under the next number, so of two planners working at
the same time one loses, reads what the other wrote, and adds only what is still missing: no input is planned twice.
"""

import hashlib
import heapq
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.discover import Found, discover, extension
from pipeline.errors import ConfigError, SystemFailure
from pipeline.load import probe_seconds
from pipeline.messages import Shard, Source
from pipeline.storage import Storage, join
from pipeline.write import part_uri

_MAX_SHARD_INPUTS = 2048  # files of a second or two: a shard then holds about an hour, and a part stays below a few MB
_MAX_PROBED_ALL = 512  # up to here every header is read, a few seconds of work even on object storage
_NUM_SAMPLED = 64  # per extension, above that
_NUM_PROBE_THREADS = 16
# 128 kbit/s: between compressed speech (32 kbit/s) and 16 kHz PCM (256 kbit/s), wrong by no more than 4 for either.
_ASSUMED_BYTES_PER_SECOND = 16_000
_MAX_PLANNERS = 8  # losing to this many others in a row means that the storage is lying about what exists

_MANIFEST_NAME = re.compile(r"plan-(\d{5,})\.parquet")
_MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.binary(), nullable=False),  # a file name need not be UTF-8, and has to be found again
        pa.field("size_bytes", pa.int64()),
        pa.field("version", pa.string(), nullable=False),
        pa.field("estimated_seconds", pa.float64(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to be done for one output, the longest inputs first, whatever is done of it already."""

    shards: tuple[Shard, ...]
    ignored: Mapping[str, int] = field(default_factory=dict[str, int])  # as in `Discovery`; empty when read back

    @property
    def num_inputs(self) -> int:
        return sum(len(shard.sources) for shard in self.shards)

    @property
    def estimated_seconds(self) -> float:
        """Of audio; an estimate from headers and sizes, nothing was decoded for it."""
        return math.fsum(shard.estimated_seconds for shard in self.shards)


_Group = list[tuple[Source, float]]  # the inputs of a shard and their seconds, longest first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A row of a manifest."""

    source: Source
    version: str
    estimated_seconds: float
    shard_id: str
    position: int


def estimate_seconds(sources: Sequence[Source], storage: Storage) -> list[tuple[Source, float]]:
    """Estimate how long each input is, in seconds: from headers where they were read, else from sizes.

    With few inputs every header is read; with many, a fixed sample per extension gives its seconds per byte.
    An input whose size is unknown counts as 0.
    """
    sized = [source for source in sources if source.size_bytes is not None]
    chosen = sized if len(sized) <= _MAX_PROBED_ALL else _sample(sized)
    seconds = _probe(chosen, storage)
    rates = _seconds_per_byte(chosen, seconds)

    def estimate(source: Source) -> float:
        if source.id in seconds:
            return seconds[source.id]
        return (source.size_bytes or 0) * rates.get(extension(source.uri), 1 / _ASSUMED_BYTES_PER_SECOND)

    return [(source, estimate(source)) for source in sources]


def cut_shards(estimated: Iterable[tuple[Source, float]], *, shard_audio_hours: float) -> tuple[Shard, ...]:
    """Cut inputs of similar length into shards, the longest first; the order of `estimated` does not matter.

    A shard holds at most `shard_audio_hours`, except that a longer file is a shard of its own.
    """
    limit_seconds = shard_audio_hours * 3600
    groups: list[_Group] = []
    filled_seconds = 0.0
    for source, seconds in sorted(estimated, key=lambda pair: (-pair[1], pair[0].id)):
        if not groups or filled_seconds + seconds > limit_seconds or len(groups[-1]) == _MAX_SHARD_INPUTS:
            groups.append([])
            filled_seconds = 0.0
        groups[-1].append((source, seconds))
        filled_seconds += seconds
    return _longest_first({_shard_id(group): group for group in groups})


def make_plan(config: RunConfig, input_storage: Storage, output_storage: Storage, *, write: bool = True) -> Plan:
    """List the inputs and plan those that are not planned yet; what was planned before stays exactly as it is.

    With `write=False` the same plan is returned and storage is left as it was.

    Raises:
        ConfigError: as `discover`, or the output is not set or not writable.
        SystemFailure: a manifest on storage is damaged, or storage does not keep what it was given.
    """
    output_uri = config.output.uri
    if not output_uri:
        raise ConfigError("output.uri is not set; name the folder that the transcripts go to")
    if write:
        output_storage.check_writable(output_uri)
    discovery = discover(config.input.uris, input_storage, output_uri=output_uri)
    for _ in range(_MAX_PLANNERS):
        manifests = _manifests(output_uri, output_storage)
        planned = _read_manifests(manifests.values(), output_storage)
        known = {row.source.id for row in planned}
        new = [one for one in discovery.found if one.source.id not in known]
        added = _plan_new(new, input_storage, shard_audio_hours=config.input.shard_audio_hours)
        number = max(manifests, default=-1) + 1
        uri = join(_manifest_folder(output_uri), f"plan-{number:05d}.parquet")
        if not added or not write or output_storage.create(uri, _parquet(added)):
            return Plan(shards=_shards_of([*planned, *added]), ignored=discovery.ignored)
    raise SystemFailure(f"{_manifest_folder(output_uri)}: a new manifest is refused, as if it were there, and is not")


def read_plan(output_uri: str, storage: Storage) -> Plan:
    """The plan as it was written, from the output alone.

    Raises:
        ConfigError: there is none.
        SystemFailure: a manifest is damaged.
    """
    manifests = _manifests(output_uri, storage)
    if not manifests:
        raise ConfigError(f"no plan in {_manifest_folder(output_uri)}; run `kikitori plan` or `kikitori run` first")
    return Plan(shards=_shards_of(_read_manifests(manifests.values(), storage)))


def committed(output_uri: str, storage: Storage) -> set[str]:
    """The ids of the shards whose part is there, from one listing."""
    folder, _, name = part_uri(output_uri, "*").rpartition("/")
    if not storage.is_folder(folder):
        return set()
    prefix, suffix = name.split("*")
    names = (PurePosixPath(entry.uri).name for entry in storage.list_files(folder))
    return {name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix)}


def remaining(plan: Plan, committed_ids: set[str]) -> tuple[Shard, ...]:
    """The shards still to be done, in the order of the plan."""
    return tuple(shard for shard in plan.shards if shard.id not in committed_ids)


def _sample(sources: Iterable[Source]) -> list[Source]:
    by_extension: defaultdict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_extension[extension(source.uri)].append(source)
    # Ids are hashes: the lowest are a random sample, and the same one in any run.
    return [one for group in by_extension.values() for one in heapq.nsmallest(_NUM_SAMPLED, group, key=_id)]


def _id(source: Source) -> str:
    return source.id


def _probe(sources: Sequence[Source], storage: Storage) -> dict[str, float]:
    """Seconds by id, of those inputs whose header tells."""
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        probed = pool.map(partial(probe_seconds, storage), [source.uri for source in sources])
        pairs = zip(sources, probed, strict=True)
        # A damaged header can say anything; what cannot be a length is taken as not known.
        return {source.id: told for source, told in pairs if told is not None and math.isfinite(told) and told >= 0}


def _seconds_per_byte(sources: Iterable[Source], seconds: Mapping[str, float]) -> dict[str, float]:
    """By extension, from the sources whose seconds are known."""
    num_bytes: Counter[str] = Counter()
    known: defaultdict[str, list[float]] = defaultdict(list)
    for source in sources:
        if source.id in seconds:
            num_bytes[extension(source.uri)] += source.size_bytes or 0
            known[extension(source.uri)].append(seconds[source.id])
    return {kind: math.fsum(known[kind]) / total for kind, total in num_bytes.items() if total}


def _plan_new(new: Sequence[Found], storage: Storage, *, shard_audio_hours: float) -> list[_Planned]:
    version_of = {one.source.id: one.version for one in new}
    estimated = estimate_seconds([one.source for one in new], storage)
    seconds_of = {source.id: seconds for source, seconds in estimated}
    return [
        _Planned(
            source=source,
            version=version_of[source.id],
            estimated_seconds=seconds_of[source.id],
            shard_id=shard.id,
            position=position,
        )
        for shard in cut_shards(estimated, shard_audio_hours=shard_audio_hours)
        for position, source in enumerate(shard.sources)
    ]


def _shards_of(rows: Iterable[_Planned]) -> tuple[Shard, ...]:
    groups: defaultdict[str, _Group] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.position):
        groups[row.shard_id].append((row.source, row.estimated_seconds))
    return _longest_first(groups)


def _longest_first(groups: Mapping[str, _Group]) -> tuple[Shard, ...]:
    # The longest file bounds how early a run can end, whatever the number of machines: it has to start first.
    ids = sorted(groups, key=lambda id: (-groups[id][0][1], id))
    return tuple(
        Shard(
            id=id,
            sources=tuple(source for source, _ in groups[id]),
            estimated_seconds=math.fsum(seconds for _, seconds in groups[id]),
        )
        for id in ids
    )


def _shard_id(group: _Group) -> str:
    ids = sorted(source.id for source, _ in group)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _manifest_folder(output_uri: str) -> str:
    return join(output_uri, "_kikitori", "manifest")


def _manifests(output_uri: str, storage: Storage) -> dict[int, str]:
    """The URIs of the manifests by their number."""
    folder = _manifest_folder(output_uri)
    uris = [entry.uri for entry in storage.list_files(folder)] if storage.is_folder(folder) else []
    matches = ((_MANIFEST_NAME.fullmatch(PurePosixPath(uri).name), uri) for uri in uris)
    return {int(match[1]): uri for match, uri in matches if match}


def _read_manifests(uris: Iterable[str], storage: Storage) -> list[_Planned]:
    rows = [row for uri in uris for row in _read_manifest(uri, storage)]
    twice = [id for id, times in Counter(row.source.id for row in rows).items() if times > 1]
    if twice:
        raise SystemFailure(f"{len(twice)} inputs are planned twice, e.g. {twice[0]}; was a manifest copied here?")
    return rows


def _read_manifest(uri: str, storage: Storage) -> Iterator[_Planned]:
    try:
        table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri))).read()
    except pa.ArrowInvalid as error:
        raise SystemFailure(f"the manifest {uri} is damaged: {error}") from None
    if not table.schema.equals(_MANIFEST_SCHEMA):
        raise SystemFailure(f"{uri} is not a manifest this version can read; its columns are {table.schema.names}")
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            yield _Planned(
                source=Source(
                    id=row["id"], uri=row["uri"].decode("utf-8", "surrogateescape"), size_bytes=row["size_bytes"]
                ),
                version=row["version"],
                estimated_seconds=row["estimated_seconds"],
                shard_id=row["shard_id"],
                position=row["position"],
            )


def _parquet(rows: Sequence[_Planned]) -> bytes:
    columns = {
        "id": [row.source.id for row in rows],
        "uri": [row.source.uri.encode("utf-8", "surrogateescape") for row in rows],
        "size_bytes": [row.source.size_bytes for row in rows],
        "version": [row.version for row in rows],
        "estimated_seconds": [row.estimated_seconds for row in rows],
        "shard_id": [row.shard_id for row in rows],
        "position": [row.position for row in rows],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_MANIFEST_SCHEMA), sink, compression="zstd")
    return sink.getvalue()
