"""Inputs -> shards: what is done, committed and repeated together."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.messages import ParquetRow, Segment, Shard, Source, TarMember

_MAX_SHARD_INPUTS = 2048  # files of a second or two: a shard then holds about an hour, and a part stays below a few MB

Estimated = tuple[Source, float]  # with its seconds


def cut_shards(estimated: Iterable[Estimated], *, shard_audio_hours: float) -> tuple[Shard, ...]:
    """Cut inputs into shards, the one with the longest input first; the order of `estimated` does not matter.

    A shard holds at most `shard_audio_hours`, except that a longer input is a shard of its own. Files go with others
    of similar length, the longest first. Inputs that share a file (members, rows, segments) stay together and in its
    order, so that it is opened and read once per shard, not once per input.
    """
    pairs = list(estimated)
    num_sharing = Counter(source.file_uri for source, _ in pairs if source.place is not None)
    alone = [pair for pair in pairs if num_sharing[pair[0].file_uri] < 2]
    sharing = [pair for pair in pairs if num_sharing[pair[0].file_uri] >= 2]
    groups = [
        *_fill(sorted(alone, key=lambda pair: (-pair[1], pair[0].id)), limit_seconds=shard_audio_hours * 3600),
        *_fill(sorted(sharing, key=_in_file_order), limit_seconds=shard_audio_hours * 3600),
    ]
    shards = [(max(seconds for _, seconds in group), _shard(group)) for group in groups]
    # The longest input bounds how early a run can end, whatever the number of machines: it has to start first.
    return tuple(shard for _, shard in sorted(shards, key=lambda pair: (-pair[0], pair[1].id)))


def _fill(ordered: Iterable[Estimated], *, limit_seconds: float) -> list[list[Estimated]]:
    groups: list[list[Estimated]] = []
    filled_seconds = 0.0
    for pair in ordered:
        if not groups or filled_seconds + pair[1] > limit_seconds or len(groups[-1]) == _MAX_SHARD_INPUTS:
            groups.append([])
            filled_seconds = 0.0
        groups[-1].append(pair)
        filled_seconds += pair[1]
    return groups


def _in_file_order(pair: Estimated) -> tuple[str, float, str]:
    source = pair[0]
    match source.place:
        case TarMember() as member:
            return source.file_uri, member.offset_bytes, source.id
        case ParquetRow() as place:
            return source.file_uri, place.row, source.id
        case Segment() as segment:
            return source.file_uri, segment.start_seconds, source.id
        case None:
            return source.file_uri, 0, source.id


def _shard(group: Sequence[Estimated]) -> Shard:
    ids = sorted(source.id for source, _ in group)
    return Shard(
        id=hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16],
        sources=tuple(source for source, _ in group),
        estimated_seconds=math.fsum(seconds for _, seconds in group),
    )
