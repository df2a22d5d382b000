import random
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SystemFailure
from pipeline.messages import AudioFacts, Failure, Shard, Source, Transcript
from pipeline.plan import Plan
from pipeline.status import Status, status_of
from pipeline.storage import Storage
from pipeline.write import Provenance, WriteStage, part_uri

SECONDS = 2.5  # of every input that is ok
PROVENANCE = Provenance(model_id="demo", model_revision="a", config_fingerprint="b", version="0.1.0", run_id="r")


def make_plan(*, num_shards: int, inputs_each: int) -> Plan:
    numbers = iter(range(num_shards * inputs_each))
    shards = (
        Shard(
            id=f"{shard:016x}",
            sources=tuple(Source(id=f"{next(numbers):032x}", uri="memory://a.wav") for _ in range(inputs_each)),
            estimated_seconds=10.0 + shard,
        )
        for shard in range(num_shards)
    )
    return Plan(shards=tuple(shards))


def outcome(source: Source, code: str | None) -> Transcript | Failure:
    if code is not None:
        return Failure(
            source=source, stage="load", code=code, message="what", facts=AudioFacts(duration_seconds=SECONDS)
        )
    facts = AudioFacts(duration_seconds=SECONDS)
    return Transcript(source=source, facts=facts, text="", words=(), avg_logprob=None, ids=np.zeros(0, np.int32))


def commit(shard: Shard, folder: Path, codes: list[str | None]) -> None:
    stage = WriteStage(Storage(), str(folder), PROVENANCE, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    stage.commit(shard, [outcome(source, code) for source, code in zip(shard.sources, codes, strict=True)])


@pytest.mark.parametrize("seed", range(4))
def test_what_is_counted_is_what_was_committed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    plan = make_plan(num_shards=6, inputs_each=3)
    done = rng.sample(plan.shards, seed + 1)
    codes = {shard.id: [rng.choice([None, None, "NOT_FOUND", "TRUNCATED"]) for _ in shard.sources] for shard in done}
    for shard in done:
        commit(shard, tmp_path, codes[shard.id])
    every = [code for some in codes.values() for code in some]
    status = status_of(plan, str(tmp_path), Storage())
    assert status == Status(
        num_inputs=18,
        num_shards=6,
        num_committed_shards=len(done),
        num_rows=len(every),
        num_ok=every.count(None),
        errors={code: every.count(code) for code in ("NOT_FOUND", "TRUNCATED") if code in every},
        audio_seconds=SECONDS * every.count(None),
        remaining_seconds=sum(shard.estimated_seconds for shard in plan.shards if shard not in done),
    )
    assert status.num_ok + status.num_errors == status.num_rows
    assert not status.is_complete


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_an_output_is_complete_when_no_shard_remains(tmp_path: Path, num_shards: int) -> None:
    plan = make_plan(num_shards=num_shards, inputs_each=2)
    for shard in plan.shards:
        assert not status_of(plan, str(tmp_path), Storage()).is_complete
        commit(shard, tmp_path, [None, "EMPTY_AUDIO"])
    status = status_of(plan, str(tmp_path), Storage())
    assert status.is_complete
    assert (status.num_rows, status.remaining_seconds) == (status.num_inputs, 0)


def test_before_anything_is_written_everything_remains(tmp_path: Path) -> None:
    plan = make_plan(num_shards=2, inputs_each=2)
    status = status_of(plan, str(tmp_path / "nowhere"), Storage())
    assert (status.num_rows, status.num_committed_shards, status.remaining_seconds) == (0, 0, 21.0)
    assert not (tmp_path / "nowhere").exists()


def test_parts_of_another_plan_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    plan = make_plan(num_shards=2, inputs_each=1)
    stranger = Shard(id="f" * 16, sources=(Source(id="0" * 32, uri="memory://b.wav"),), estimated_seconds=1)
    commit(stranger, tmp_path, [None])
    (tmp_path / "data" / ".part-0000000000000000.parquet.tmp").write_bytes(b"half")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    assert status_of(plan, str(tmp_path), Storage()).num_committed_shards == 0


def test_a_damaged_part_is_named_and_not_counted_as_done(tmp_path: Path) -> None:
    plan = make_plan(num_shards=1, inputs_each=1)
    commit(plan.shards[0], tmp_path, [None])
    part = Path(part_uri(str(tmp_path), plan.shards[0].id))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SystemFailure, match=rf"{part.name} is damaged.*delete it"):
        status_of(plan, str(tmp_path), Storage())


def test_a_part_that_is_not_ours_is_named(tmp_path: Path) -> None:
    plan = make_plan(num_shards=1, inputs_each=1)
    part = Path(part_uri(str(tmp_path), plan.shards[0].id))
    part.parent.mkdir()
    pq.write_table(pa.table({"id": ["x"]}), part)
    with pytest.raises(SystemFailure, match="was not written by kikitori"):
        status_of(plan, str(tmp_path), Storage())
