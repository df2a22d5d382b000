import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages import ParquetRow, Segment, Source, TarMember
from pipeline.shards import cut_shards

Estimated = list[tuple[Source, float]]


def make_source(number: int, place: TarMember | ParquetRow | Segment | None = None) -> Source:
    return Source(id=f"{number:032x}", uri=f"memory://nothing/{number}.wav", size_bytes=1000, place=place)


@st.composite
def estimates(draw: st.DrawFn) -> Estimated:
    seconds = draw(st.lists(st.floats(0, 20_000) | st.just(60.0), max_size=60))
    return [(make_source(number), one) for number, one in enumerate(seconds)]


@st.composite
def mixtures(draw: st.DrawFn) -> Estimated:
    """Files, and members, rows and segments of a few files."""
    places = st.builds(
        lambda kind, file, at: [
            None,
            TarMember(file_uri=f"{file}.tar", file_version="", name=f"{at}.wav", offset_bytes=at),
            ParquetRow(file_uri=f"{file}.parquet", file_version="", column="audio", row=at),
            Segment(file_uri=f"{file}.wav", start_seconds=float(at), duration_seconds=1.0),
        ][kind],
        kind=st.integers(0, 3),
        file=st.integers(0, 3),
        at=st.integers(0, 10**6),
    )
    drawn = draw(st.lists(st.tuples(places, st.floats(0, 100)), max_size=60))
    return [(make_source(number, place), seconds) for number, (place, seconds) in enumerate(drawn)]


@given(estimated=estimates() | mixtures(), hours=st.floats(0.001, 10), seed=st.integers())
def test_shards_hold_every_input_once_whatever_the_order_of_the_listing(
    estimated: Estimated, hours: float, seed: int
) -> None:
    shards = cut_shards(estimated, shard_audio_hours=hours)
    assert sorted(source.id for shard in shards for source in shard.sources) == [source.id for source, _ in estimated]
    shuffled = list(estimated)
    random.Random(seed).shuffle(shuffled)
    assert cut_shards(shuffled, shard_audio_hours=hours) == shards


@given(estimated=estimates() | mixtures(), hours=st.floats(0.001, 10))
def test_shards_are_within_the_limit_and_the_longest_comes_first(estimated: Estimated, hours: float) -> None:
    seconds_of = {source.id: seconds for source, seconds in estimated}
    shards = cut_shards(estimated, shard_audio_hours=hours)
    longest = [max(seconds_of[source.id] for source in shard.sources) for shard in shards]
    assert longest == sorted(longest, reverse=True)
    for shard in shards:
        assert len(shard.sources) == 1 or shard.estimated_seconds <= hours * 3600 * (1 + 1e-9)
        assert shard.estimated_seconds == pytest.approx(sum(seconds_of[source.id] for source in shard.sources))


@given(estimated=estimates(), more=st.floats(0.001, 10))
def test_the_id_of_a_shard_follows_from_its_inputs_alone(estimated: Estimated, more: float) -> None:
    one = cut_shards(estimated, shard_audio_hours=1.0)
    other = cut_shards([(source, seconds * more) for source, seconds in estimated], shard_audio_hours=more)
    held = {shard.id: {source.id for source in shard.sources} for shard in (*one, *other)}
    assert all(held[shard.id] == {source.id for source in shard.sources} for shard in (*one, *other))
    assert all(len(id) == 16 for id in held)
    assert len({frozenset(ids) for ids in held.values()}) == len(held)


@given(estimated=mixtures())
def test_what_shares_a_file_is_read_in_its_order_and_opened_once_a_shard(estimated: Estimated) -> None:
    for shard in cut_shards(estimated, shard_audio_hours=0.05):
        files = [source.file_uri for source in shard.sources if source.place is not None]
        changes = sum(one != other for one, other in pairwise(files))
        assert changes == max(0, len(set(files)) - 1)
        for uri in set(files):
            places = [source.place for source in shard.sources if source.file_uri == uri]
            rows = [place.row for place in places if isinstance(place, ParquetRow)]
            offsets = [place.offset_bytes for place in places if isinstance(place, TarMember)]
            starts = [place.start_seconds for place in places if isinstance(place, Segment)]
            assert (rows, offsets, starts) == (sorted(rows), sorted(offsets), sorted(starts))


def test_a_shard_of_very_short_files_is_cut_by_number() -> None:
    shards = cut_shards([(make_source(number), 0.0) for number in range(5000)], shard_audio_hours=1.0)
    assert [len(shard.sources) for shard in sorted(shards, key=lambda shard: -len(shard.sources))] == [2048, 2048, 904]


def test_no_limit_gives_one_shard() -> None:
    estimated = [(make_source(number), 1e6) for number in range(3)]
    assert len(cut_shards(estimated, shard_audio_hours=float("inf"))) == 1


def test_plain_files_are_cut_as_they_always_were() -> None:
    # An output that was begun with an earlier release has to find its shards again.
    estimated = [(make_source(number), seconds) for number, seconds in enumerate([10.0, 3000.0, 700.0, 20.0, 4000.0])]
    shards = cut_shards(estimated, shard_audio_hours=1.0)
    assert [(shard.id, shard.estimated_seconds) for shard in shards] == [
        ("a20248c7f641bea3", 4000.0),
        ("e0cca2965509df67", 3000.0),
        ("32e1da0323a6c01d", 730.0),
    ]
