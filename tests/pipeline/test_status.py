import random
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SystemFailure
from pipeline.messages import AudioFacts, Failure, Shard, ShardRef, Source, Transcript
from pipeline.plan import Plan
from pipeline.status import Status, quick_status_of, status_of, work_of
from pipeline.storage import Storage
from pipeline.versions import COLUMNS, read_versions, record_version
from pipeline.write import Provenance, WriteStage, part_uri

SECONDS = 2.5  # of every input that is ok
PROVENANCE = Provenance(model_id="demo", model_revision="a", config_fingerprint="b", version="0.1.0", run_id="r")


def make_shards(*, num_shards: int, inputs_each: int) -> list[Shard]:
    numbers = iter(range(num_shards * inputs_each))
    return [
        Shard(
            id=f"{shard:016x}",
            sources=tuple(Source(id=f"{next(numbers):032x}", uri="memory://a.wav") for _ in range(inputs_each)),
            estimated_seconds=10.0 + shard,
        )
        for shard in range(num_shards)
    ]


def plan_of(shards: list[Shard]) -> Plan:
    refs = [
        ShardRef(
            id=shard.id,
            num_inputs=len(shard.sources),
            estimated_seconds=shard.estimated_seconds,
            longest_seconds=1.0,
            manifest_uri="",
            first_row=0,
        )
        for shard in shards
    ]
    return Plan(shards=tuple(refs))


def put_in_force(folder: Path, **settings: object) -> Provenance:
    """Record settings, without extra columns; -> the provenance of what is made with them."""
    known = read_versions(str(folder), Storage())
    version = record_version(settings | {COLUMNS: []}, known, output_uri=str(folder), storage=Storage())
    return replace(PROVENANCE, config_fingerprint=version.config_fingerprint)


def outcome(source: Source, code: str | None) -> Transcript | Failure:
    if code is not None:
        return Failure(
            source=source, stage="load", code=code, message="what", facts=AudioFacts(duration_seconds=SECONDS)
        )
    facts = AudioFacts(duration_seconds=SECONDS)
    return Transcript(source=source, facts=facts, text="", words=(), avg_logprob=None, ids=np.zeros(0, np.int32))


def commit(shard: Shard, folder: Path, codes: list[str | None], provenance: Provenance = PROVENANCE) -> None:
    stage = WriteStage(Storage(), str(folder), provenance, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    stage.commit(shard, [outcome(source, code) for source, code in zip(shard.sources, codes, strict=True)])


@pytest.mark.parametrize("seed", range(4))
def test_what_is_counted_is_what_was_committed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shards = make_shards(num_shards=6, inputs_each=3)
    plan = plan_of(shards)
    done = rng.sample(shards, seed + 1)
    codes = {shard.id: [rng.choice([None, None, "NOT_FOUND", "TRUNCATED"]) for _ in shard.sources] for shard in done}
    for shard in done:
        commit(shard, tmp_path, codes[shard.id])
    every = [code for some in codes.values() for code in some]
    status = status_of(plan, str(tmp_path), Storage())
    assert status == Status(
        num_inputs=18,
        num_shards=6,
        num_committed_shards=len(done),
        num_outdated_shards=0,
        num_rows=len(every),
        num_ok=every.count(None),
        errors={code: every.count(code) for code in ("NOT_FOUND", "TRUNCATED") if code in every},
        audio_seconds=SECONDS * every.count(None),
        remaining_seconds=sum(shard.estimated_seconds for shard in shards if shard not in done),
        versions=(),
    )
    assert status.num_ok + status.num_errors == status.num_rows
    assert not status.is_complete


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_an_output_is_complete_when_no_shard_remains(tmp_path: Path, num_shards: int) -> None:
    shards = make_shards(num_shards=num_shards, inputs_each=2)
    plan = plan_of(shards)
    for shard in shards:
        assert not status_of(plan, str(tmp_path), Storage()).is_complete
        commit(shard, tmp_path, [None, "EMPTY_AUDIO"])
    status = status_of(plan, str(tmp_path), Storage())
    assert status.is_complete
    assert (status.num_rows, status.remaining_seconds) == (status.num_inputs, 0)


def test_before_anything_is_written_everything_remains(tmp_path: Path) -> None:
    plan = plan_of(make_shards(num_shards=2, inputs_each=2))
    status = status_of(plan, str(tmp_path / "nowhere"), Storage())
    assert (status.num_rows, status.num_committed_shards, status.remaining_seconds) == (0, 0, 21.0)
    assert not (tmp_path / "nowhere").exists()


def test_parts_of_another_plan_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    plan = plan_of(make_shards(num_shards=2, inputs_each=1))
    stranger = Shard(id="f" * 16, sources=(Source(id="0" * 32, uri="memory://b.wav"),), estimated_seconds=1)
    commit(stranger, tmp_path, [None])
    (tmp_path / "data" / ".part-0000000000000000.parquet.tmp").write_bytes(b"half")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    assert status_of(plan, str(tmp_path), Storage()).num_committed_shards == 0


def test_a_damaged_part_is_named_and_not_counted_as_done(tmp_path: Path) -> None:
    [shard] = make_shards(num_shards=1, inputs_each=1)
    plan = plan_of([shard])
    commit(shard, tmp_path, [None])
    part = Path(part_uri(str(tmp_path), shard.id))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SystemFailure, match=rf"{part.name} is damaged.*delete it"):
        status_of(plan, str(tmp_path), Storage())


def test_a_part_that_is_not_ours_is_named(tmp_path: Path) -> None:
    plan = plan_of(make_shards(num_shards=1, inputs_each=1))
    part = Path(part_uri(str(tmp_path), plan.shards[0].id))
    part.parent.mkdir()
    pq.write_table(pa.table({"id": ["x"]}), part)
    with pytest.raises(SystemFailure, match="was not written by kikitori"):
        status_of(plan, str(tmp_path), Storage())


@pytest.mark.parametrize("seed", range(4))
def test_after_new_settings_what_was_made_with_the_old_ones_remains(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shards = make_shards(num_shards=6, inputs_each=2)
    plan = plan_of(shards)
    old = put_in_force(tmp_path, a=1)
    for shard in rng.sample(shards, 4):
        commit(shard, tmp_path, [None, "NOT_FOUND"], old)
    new = put_in_force(tmp_path, a=2)
    again = rng.sample(shards, seed)
    for shard in again:
        commit(shard, tmp_path, [None, None], new)
    status = status_of(plan, str(tmp_path), Storage())
    assert (status.num_committed_shards, status.num_shards) == (seed, 6)
    assert [version.num_parts for version in status.versions] == [status.num_outdated_shards, seed]
    assert status.num_rows == 2 * sum(version.num_parts for version in status.versions)
    assert status.remaining_seconds == sum(shard.estimated_seconds for shard in shards if shard not in again)
    work = work_of(plan, str(tmp_path), Storage(), versions=read_versions(str(tmp_path), Storage()))
    assert {shard.id for shard in work.shards} == {shard.id for shard in shards if shard not in again}
    assert (work.num_inputs, work.estimated_seconds) == (2 * (6 - seed), status.remaining_seconds)


def test_going_back_to_earlier_settings_finds_what_they_made(tmp_path: Path) -> None:
    [shard] = shards = make_shards(num_shards=1, inputs_each=1)
    old = put_in_force(tmp_path, a=1)
    commit(shard, tmp_path, [None], old)
    put_in_force(tmp_path, a=2)
    assert not status_of(plan_of(shards), str(tmp_path), Storage()).is_complete
    put_in_force(tmp_path, a=1)
    status = status_of(plan_of(shards), str(tmp_path), Storage())
    assert status.is_complete
    assert [version.num_parts for version in status.versions] == [0, 0, 1]


def test_a_plain_resume_reads_no_footer(tmp_path: Path) -> None:
    shards = make_shards(num_shards=3, inputs_each=1)
    for shard in shards[:2]:
        commit(shard, tmp_path, [None], put_in_force(tmp_path, a=1))
    for part in (tmp_path / "data").iterdir():
        part.write_bytes(b"not to be opened")
    versions = read_versions(str(tmp_path), Storage())
    work = work_of(plan_of(shards), str(tmp_path), Storage(), versions=versions)
    assert [shard.id for shard in work.shards] == [shards[2].id]


def test_what_is_retried_is_what_carries_the_code(tmp_path: Path) -> None:
    shards = make_shards(num_shards=4, inputs_each=4)
    commit(shards[0], tmp_path, [None] * 4)
    commit(shards[1], tmp_path, [None, "NOT_FOUND", "NOT_FOUND", "TRUNCATED"])
    commit(shards[2], tmp_path, [None, None, "FETCH_FAILED", "TRUNCATED"])
    work = work_of(plan_of(shards), str(tmp_path), Storage(), retry_codes=["NOT_FOUND", "FETCH_FAILED"])
    assert {shard.id for shard in work.shards} == {shard.id for shard in shards[1:]}
    assert work.num_inputs == 2 + 1 + 4
    assert work.estimated_seconds == 11 / 2 + 12 / 4 + 13


def test_where_time_is_short_no_footer_is_read(tmp_path: Path) -> None:
    shards = make_shards(num_shards=3, inputs_each=1)
    commit(shards[0], tmp_path, [None])
    full = status_of(plan_of(shards), str(tmp_path), Storage())
    Path(part_uri(str(tmp_path), shards[0].id)).write_bytes(b"not to be opened")
    quick = quick_status_of(plan_of(shards), str(tmp_path), Storage())
    assert (quick.num_committed_shards, quick.remaining_seconds) == (full.num_committed_shards, full.remaining_seconds)
    assert not quick.is_counted
    assert not quick.is_complete
