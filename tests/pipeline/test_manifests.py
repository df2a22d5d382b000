import os
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.manifests
from pipeline.errors import SystemFailure
from pipeline.manifests import load_shard, read_listing, refs_of, to_parquet
from pipeline.messages import ParquetRow, Segment, Shard, ShardRef, Source, TarMember
from pipeline.storage import Storage

TEXTS = st.text(max_size=8) | st.just("caf\udce9")
PLACES = st.one_of(
    st.none(),
    st.builds(TarMember, file_uri=TEXTS, file_version=st.just("v"), name=TEXTS, offset_bytes=st.integers(0, 2**50)),
    st.builds(ParquetRow, file_uri=TEXTS, file_version=st.just("v"), column=st.text(), row=st.integers(0, 2**50)),
    st.builds(
        Segment, file_uri=TEXTS, start_seconds=st.floats(0, 1e9), duration_seconds=st.none() | st.floats(1e-9, 1e9)
    ),
)


@st.composite
def shard_lists(draw: st.DrawFn) -> list[Shard]:
    numbers = iter(range(10**6))
    source = st.builds(
        lambda **fields: Source(id=f"{next(numbers):032x}", **fields),
        uri=TEXTS,
        size_bytes=st.none() | st.integers(0, 2**50),
        place=PLACES,
        fault=st.none() | TEXTS,
    )
    groups = draw(st.lists(st.lists(source, min_size=1, max_size=6), max_size=8))
    return [
        Shard(id=f"{index:016x}", sources=tuple(group), estimated_seconds=float(len(group)))
        for index, group in enumerate(groups)
    ]


def put(path: Path, shards: list[Shard]) -> tuple[ShardRef, ...]:
    seconds = {source.id: 1.0 for shard in shards for source in shard.sources}
    path.write_bytes(to_parquet(shards, seconds=seconds, versions=dict.fromkeys(seconds, "v")))
    return refs_of(shards, str(path), seconds=seconds)


@given(shards=shard_lists(), min_group_rows=st.integers(1, 12))
def test_every_shard_comes_back_alone_and_as_it_was(shards: list[Shard], min_group_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.manifests, "_MIN_GROUP_ROWS", min_group_rows)
        path = Path(folder) / "plan-00000.manifest"
        refs = put(path, shards)
        listing = read_listing(str(path), Storage(), with_ids=True)
        assert listing.shards == refs
        assert list(listing.ids) == [source.id for shard in shards for source in shard.sources]
        assert read_listing(str(path), Storage(), with_ids=False).ids == ()
        for ref, shard in random.Random(0).sample(list(zip(refs, shards, strict=True)), len(shards)):
            assert load_shard(ref, Storage()) == shard


def test_seconds_are_added_up_and_the_longest_is_known(tmp_path: Path) -> None:
    sources = tuple(Source(id=f"{number:032x}", uri="a.wav") for number in range(3))
    shard = Shard(id="0" * 16, sources=sources, estimated_seconds=6.5)
    seconds = dict(zip((source.id for source in sources), (1.5, 4.0, 1.0), strict=True))
    path = tmp_path / "plan.parquet"
    path.write_bytes(to_parquet([shard], seconds=seconds, versions=dict.fromkeys(seconds, "")))
    (ref,) = read_listing(str(path), Storage(), with_ids=False).shards
    assert (ref.num_inputs, ref.estimated_seconds, ref.longest_seconds, ref.first_row) == (3, 6.5, 4.0, 0)


def test_a_manifest_of_the_first_release_is_read(tmp_path: Path) -> None:
    # One row group, and no columns for places.
    rows = {
        "id": [f"{number:032x}" for number in range(5)],
        "uri": [os.fsencode(f"/in/{number}.wav") for number in range(5)],
        "size_bytes": [1, None, 3, 4, 5],
        "version": [""] * 5,
        "estimated_seconds": [5.0, 4.0, 3.0, 2.0, 1.0],
        "shard_id": ["a" * 16] * 2 + ["b" * 16] * 3,
        "position": [0, 1, 0, 1, 2],
    }
    path = tmp_path / "plan-00000.manifest"
    pq.write_table(pa.table(rows, schema=pa.schema(pipeline.manifests._FIRST_FIELDS)), path)
    listing = read_listing(str(path), Storage(), with_ids=True)
    assert [(ref.id, ref.num_inputs, ref.estimated_seconds) for ref in listing.shards] == [
        ("a" * 16, 2, 9.0),
        ("b" * 16, 3, 6.0),
    ]
    shard = load_shard(listing.shards[1], Storage())
    assert shard.sources == tuple(
        Source(id=f"{number:032x}", uri=f"/in/{number}.wav", size_bytes=number + 1) for number in (2, 3, 4)
    )


def test_a_shard_is_read_without_the_rest_of_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.manifests, "_MIN_GROUP_ROWS", 10)
    shards = [
        Shard(
            id=f"{index:016x}",
            sources=tuple(Source(id=f"{index * 10 + n:032x}", uri=f"/{index}/{n}.wav") for n in range(10)),
            estimated_seconds=10.0,
        )
        for index in range(20)
    ]
    refs = put(tmp_path / "plan.parquet", shards)
    assert pq.read_metadata(tmp_path / "plan.parquet").num_row_groups == 20
    last_group = pq.read_metadata(tmp_path / "plan.parquet").row_group(19).column(0).dictionary_page_offset
    data = bytearray((tmp_path / "plan.parquet").read_bytes())
    data[4:last_group] = bytes(last_group - 4)  # nothing of the others can be read any more
    (tmp_path / "plan.parquet").write_bytes(data)
    assert load_shard(refs[-1], Storage()) == shards[-1]


def test_a_manifest_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    shards = [
        Shard(id=f"{index:016x}", sources=(Source(id=f"{index:032x}", uri="a.wav"),), estimated_seconds=1.0)
        for index in range(2)
    ]
    refs = put(path, shards)
    put(path, shards[::-1])
    with pytest.raises(SystemFailure, match="does not hold shard 0000000000000001 where it did"):
        load_shard(refs[1], Storage())
    put(path, shards[:1])
    with pytest.raises(SystemFailure, match="was it replaced"):
        load_shard(refs[1], Storage())
    path.unlink()
    with pytest.raises(SystemFailure, match="is gone"):
        load_shard(refs[0], Storage())
