"""The files a plan is written in: a row per input, the inputs of a shard in a row, a shard read back on its own."""

import io
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SystemFailure
from pipeline.messages import ParquetRow, Segment, Shard, ShardRef, Source, TarMember
from pipeline.storage import Storage

# Row groups end where shards do and hold at least this many rows: enough to compress, a few milliseconds to read.
_MIN_GROUP_ROWS = 4096
_FIRST_FIELDS = (  # all that manifests had before inputs could be parts of files
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.binary(), nullable=False),  # a file name need not be UTF-8, and has to be found again
    pa.field("size_bytes", pa.int64()),
    pa.field("version", pa.string(), nullable=False),  # of the file, the tar or the Parquet file
    pa.field("estimated_seconds", pa.float64(), nullable=False),
    pa.field("shard_id", pa.string(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
)
_PLACE_FIELDS = (
    pa.field("file_uri", pa.binary()),  # null: the whole file at `uri`; else one of the following three is there
    pa.field("member", pa.binary()),
    pa.field("row", pa.int64()),
    pa.field("start_seconds", pa.float64()),
    pa.field("offset_bytes", pa.int64()),  # of the member
    pa.field("column", pa.string()),  # of the row
    pa.field("duration_seconds", pa.float64()),  # of the segment
    pa.field("fault", pa.binary()),
)
_SCHEMA = pa.schema([*_FIRST_FIELDS, *_PLACE_FIELDS])
_READABLE = (_SCHEMA, pa.schema(_FIRST_FIELDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a manifest holds, as far as planning and counting need it."""

    shards: tuple[ShardRef, ...]
    ids: tuple[str, ...]  # of all inputs, if they were asked for


def to_parquet(shards: Sequence[Shard], *, seconds: Mapping[str, float], versions: Mapping[str, str]) -> bytes:
    """A manifest; estimated seconds and file versions are given by source id."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as writer:
        for group in _groups(shards):
            writer.write_table(_table(group, seconds, versions))
    return sink.getvalue()


def refs_of(shards: Sequence[Shard], manifest_uri: str, *, seconds: Mapping[str, float]) -> tuple[ShardRef, ...]:
    """The shards of a manifest as `read_listing` will list them."""
    starts = accumulate((len(shard.sources) for shard in shards), initial=0)
    return tuple(
        _ref(shard.id, [seconds[source.id] for source in shard.sources], manifest_uri=manifest_uri, first_row=first_row)
        for shard, first_row in zip(shards, starts, strict=False)
    )


def read_listing(uri: str, storage: Storage, *, with_ids: bool) -> Listing:
    """The shards of a manifest, from the columns that say so.

    Raises:
        SystemFailure: the manifest is damaged, or not one that this version can read.
    """
    columns = ["shard_id", "estimated_seconds", *(["id"] if with_ids else [])]
    with _opened(uri, storage) as parquet:
        table = parquet.read(columns=columns, use_threads=False)
    seconds = table["estimated_seconds"].to_numpy()
    shard_ids = table["shard_id"].combine_chunks().dictionary_encode()
    codes = shard_ids.indices.to_numpy(zero_copy_only=False)
    starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)] if len(codes) else []
    return Listing(
        shards=tuple(
            _ref(
                shard_ids.dictionary[int(codes[start])].as_py(),
                seconds[start:end].tolist(),
                manifest_uri=uri,
                first_row=start,
            )
            for start, end in pairwise(starts)
        ),
        ids=tuple(table["id"].to_pylist()) if with_ids else (),
    )


def load_shard(ref: ShardRef, storage: Storage) -> Shard:
    """The shard with its sources, from the few rows of its manifest.

    Raises:
        SystemFailure: the manifest is damaged, or is not the one it was.
    """
    with _opened(ref.manifest_uri, storage) as parquet:
        rows = _read_rows(parquet, ref.first_row, ref.num_inputs)
    if len(rows) != ref.num_inputs or {row["shard_id"] for row in rows} != {ref.id}:
        raise SystemFailure(f"{ref.manifest_uri} does not hold shard {ref.id} where it did; was it replaced?")
    sources = tuple(_source(row) for row in rows)
    return Shard(id=ref.id, sources=sources, estimated_seconds=ref.estimated_seconds)


@contextmanager
def _opened(uri: str, storage: Storage) -> Generator[Any]:
    try:
        with storage.open(uri) as file:
            parquet = pq.ParquetFile(file)
            if not any(parquet.schema_arrow.equals(schema) for schema in _READABLE):
                names = parquet.schema_arrow.names
                raise SystemFailure(f"{uri} is not a manifest this version can read; its columns are {names}")
            yield parquet
    except FileNotFoundError:
        raise SystemFailure(f"the manifest {uri} is gone; restore it, or choose another output.uri") from None
    except pa.ArrowInvalid as error:
        raise SystemFailure(f"the manifest {uri} is damaged: {error}") from None
    except OSError as error:  # also what pyarrow calls some kinds of damage
        raise SystemFailure(f"the manifest {uri} cannot be read: {error}") from None


def _read_rows(parquet: Any, first_row: int, num_rows: int) -> list[dict[str, Any]]:
    sizes = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    starts = list(accumulate(sizes, initial=0))
    end = first_row + num_rows
    groups = [index for index, start in enumerate(starts[:-1]) if start < end and starts[index + 1] > first_row]
    if not groups:
        return []
    table = parquet.read_row_groups(groups, use_threads=False)
    return table.slice(first_row - starts[groups[0]], num_rows).to_pylist()


def _ref(id: str, seconds: Sequence[float], *, manifest_uri: str, first_row: int) -> ShardRef:
    return ShardRef(
        id=id,
        num_inputs=len(seconds),
        estimated_seconds=math.fsum(seconds),
        longest_seconds=max(seconds),
        manifest_uri=manifest_uri,
        first_row=first_row,
    )


def _groups(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    num_rows = 0
    for shard in shards:
        group.append(shard)
        num_rows += len(shard.sources)
        if num_rows >= _MIN_GROUP_ROWS:
            yield group
            group, num_rows = [], 0
    if group:
        yield group


def _table(shards: Sequence[Shard], seconds: Mapping[str, float], versions: Mapping[str, str]) -> Any:
    sources = [source for shard in shards for source in shard.sources]
    places = [source.place for source in sources]
    members = [place if isinstance(place, TarMember) else None for place in places]
    rows = [place if isinstance(place, ParquetRow) else None for place in places]
    segments = [place if isinstance(place, Segment) else None for place in places]
    columns = {
        "id": [source.id for source in sources],
        "uri": [_to_bytes(source.uri) for source in sources],
        "size_bytes": [source.size_bytes for source in sources],
        "version": [versions[source.id] for source in sources],
        "estimated_seconds": [seconds[source.id] for source in sources],
        "shard_id": [shard.id for shard in shards for _ in shard.sources],
        "position": [position for shard in shards for position in range(len(shard.sources))],
        "file_uri": [place and _to_bytes(place.file_uri) for place in places],
        "member": [member and _to_bytes(member.name) for member in members],
        "row": [row and row.row for row in rows],
        "start_seconds": [segment and segment.start_seconds for segment in segments],
        "offset_bytes": [member and member.offset_bytes for member in members],
        "column": [row and row.column for row in rows],
        "duration_seconds": [segment and segment.duration_seconds for segment in segments],
        "fault": [source.fault and _to_bytes(source.fault) for source in sources],
    }
    return pa.table(columns, schema=_SCHEMA)


def _source(row: Mapping[str, Any]) -> Source:
    fault = row.get("fault")
    return Source(
        id=row["id"],
        uri=_to_text(row["uri"]),
        size_bytes=row["size_bytes"],
        place=_place(row) if row.get("file_uri") is not None else None,
        fault=None if fault is None else _to_text(fault),
    )


def _place(row: Mapping[str, Any]) -> TarMember | ParquetRow | Segment:
    file_uri, version = _to_text(row["file_uri"]), row["version"]
    if row["member"] is not None:
        name, offset_bytes = _to_text(row["member"]), row["offset_bytes"]
        return TarMember(file_uri=file_uri, file_version=version, name=name, offset_bytes=offset_bytes)
    if row["row"] is not None:
        return ParquetRow(file_uri=file_uri, file_version=version, column=row["column"], row=row["row"])
    return Segment(file_uri=file_uri, start_seconds=row["start_seconds"], duration_seconds=row["duration_seconds"])


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
