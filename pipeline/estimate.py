"""How long inputs are, before anything is decoded: from manifests and headers where they say, else from sizes."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from pipeline.discover import Found, extension
from pipeline.load import probe_seconds
from pipeline.messages import ParquetRow, Source, TarMember
from pipeline.storage import Storage

_MAX_PROBED_ALL = 512  # up to here every header is read, a few seconds of work even on object storage
_NUM_SAMPLED = 64  # per kind of file, above that
# To reach a cell of a Parquet file, all bytes before it in its page are read: a few files' first rows have to do.
_NUM_SAMPLED_TABLES, _NUM_SAMPLED_ROWS = 4, 16
_NUM_PROBE_THREADS = 16
# 128 kbit/s: between compressed speech (32 kbit/s) and 16 kHz PCM (256 kbit/s), wrong by no more than 4 for either.
_ASSUMED_BYTES_PER_SECOND = 16_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What is known of files with one extension."""

    seconds_per_byte: float | None
    seconds_each: float | None  # of those whose size is not known


def estimate_seconds(inputs: Sequence[Found], storage: Storage) -> list[float]:
    """Seconds of every input: as a manifest says, from headers where they were read, else from sizes.

    With few inputs every header is read; with many, a fixed sample per kind of file gives its seconds per byte.
    An input of which nothing is known counts as 0.
    """
    unsaid = [one for one in inputs if one.declared_seconds is None and one.source.fault is None]
    chosen = _choose(unsaid)
    seconds = _probe([one.source for one in chosen], storage)
    kinds = _kinds(chosen, seconds)

    def estimate(one: Found) -> float:
        if one.declared_seconds is not None:
            return one.declared_seconds
        if one.source.id in seconds:
            return seconds[one.source.id]
        kind = kinds.get(_kind_of(one.source)) if one.source.fault is None else None
        if one.size_bytes is None:
            return (kind and kind.seconds_each) or 0.0
        return one.size_bytes * ((kind and kind.seconds_per_byte) or 1 / _ASSUMED_BYTES_PER_SECOND)

    return [estimate(one) for one in inputs]


def _choose(inputs: Sequence[Found]) -> list[Found]:
    """Those whose headers are worth reading."""
    rows = [one for one in inputs if isinstance(one.source.place, ParquetRow)]
    others = [one for one in inputs if not isinstance(one.source.place, ParquetRow)]
    return _sample_rows(rows) + (others if len(others) <= _MAX_PROBED_ALL else _sample(others))


def _sample(inputs: Iterable[Found]) -> list[Found]:
    by_kind: defaultdict[tuple[str, bool], list[Found]] = defaultdict(list)
    for one in inputs:
        by_kind[_kind_of(one.source), one.size_bytes is None].append(one)
    # Ids are hashes: the lowest are a random sample, and the same one in any run.
    return [one for group in by_kind.values() for one in heapq.nsmallest(_NUM_SAMPLED, group, key=_id)]


def _sample_rows(inputs: Iterable[Found]) -> list[Found]:
    first_rows: defaultdict[str, list[Found]] = defaultdict(list)
    for one in inputs:
        if isinstance(one.source.place, ParquetRow) and one.source.place.row < _NUM_SAMPLED_ROWS:
            first_rows[one.source.file_uri].append(one)
    chosen = heapq.nsmallest(_NUM_SAMPLED_TABLES, first_rows.values(), key=lambda rows: rows[0].source.id)
    return [one for rows in chosen for one in rows]


def _id(one: Found) -> str:
    return one.source.id


def _kind_of(source: Source) -> str:
    """What files have in common that are as long per byte."""
    return extension(source.place.name if isinstance(source.place, TarMember) else source.file_uri)


def _probe(sources: Sequence[Source], storage: Storage) -> dict[str, float]:
    """Seconds by id, of those inputs whose header tells."""
    ordered = sorted(sources, key=lambda source: source.file_uri)
    files = [list(group) for _, group in groupby(ordered, key=lambda source: source.file_uri)]
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        probed = [seconds for some in pool.map(partial(probe_seconds, storage), files) for seconds in some]
    pairs = zip(ordered, probed, strict=True)
    # A damaged header can say anything; what cannot be a length is taken as not known.
    return {source.id: told for source, told in pairs if told is not None and math.isfinite(told) and told >= 0}


def _kinds(probed: Iterable[Found], seconds: Mapping[str, float]) -> dict[str, _Kind]:
    num_bytes: Counter[str] = Counter()
    sized: defaultdict[str, list[float]] = defaultdict(list)
    unsized: defaultdict[str, list[float]] = defaultdict(list)
    for one in probed:
        if one.source.id in seconds:
            kind = _kind_of(one.source)
            num_bytes[kind] += one.size_bytes or 0
            (unsized if one.size_bytes is None else sized)[kind].append(seconds[one.source.id])
    return {
        kind: _Kind(
            seconds_per_byte=math.fsum(sized[kind]) / num_bytes[kind] if num_bytes[kind] else None,
            seconds_each=math.fsum(unsized[kind]) / len(unsized[kind]) if unsized[kind] else None,
        )
        for kind in {*sized, *unsized}
    }
