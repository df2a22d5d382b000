"""The oracle must be able to say no: each promise is broken once, by hand."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig, load_config
from pipeline.manifests import load_shard
from pipeline.messages import AudioFacts, Source, Transcript, Word
from pipeline.plan import make_plan
from pipeline.storage import Storage
from pipeline.write import Provenance, WriteStage
from tests.crash.oracle import Reader, Rows, by_id, problems_of, read_rows
from tests.crash.world import Place
from tests.make_audio import sine, wav


def transcript(source: Source) -> Transcript:
    word = Word(text="one", start_seconds=0.1, end_seconds=0.2, confidence=0.5)
    ids = np.array([1, 2], np.int32)
    return Transcript(source=source, facts=AudioFacts(), text=source.uri, words=(word,), avg_logprob=None, ids=ids)


@pytest.fixture
def output(tmp_path: Path) -> tuple[Place, Rows]:
    """A complete one of three shards."""
    (tmp_path / "in").mkdir()
    for index in range(6):
        (tmp_path / "in" / f"{index}.wav").write_bytes(wav(sine(0.5 + index / 100)))
    place = Place(tmp_path, str(tmp_path / "out"), {}, {})
    config: RunConfig = load_config(
        None,
        [f"input.uris=[{tmp_path / 'in'}]", f"output.uri={place.output_uri}", "input.shard_audio_hours=0.00031"],
    )
    provenance = Provenance(model_id="m", model_revision="r", config_fingerprint="f", version="0", run_id="x")
    stage = WriteStage(Storage(), place.output_uri, provenance, columns=["tokens"], clock=lambda: datetime.now(UTC))
    for ref in make_plan(config, Storage(), Storage()).shards:
        shard = load_shard(ref, Storage())
        stage.commit(shard, [transcript(source) for source in shard.sources])
    return place, by_id(read_rows(place))


def parts(place: Place) -> list[Path]:
    return sorted(Path(place.output_uri, "data").glob("*.parquet"))


def test_a_good_output_has_no_problems(output: tuple[Place, Rows]) -> None:
    place, expected = output
    assert len(parts(place)) == 3
    assert problems_of(place, expected) == []


def test_a_missing_part(output: tuple[Place, Rows]) -> None:
    place, expected = output
    parts(place)[0].unlink()
    problems = " ".join(problems_of(place, expected))
    for what in ("has no row", "has no part", "still to be done"):
        assert what in problems


def test_an_input_twice_and_a_part_that_is_not_planned(output: tuple[Place, Rows]) -> None:
    place, expected = output
    part = parts(place)[0]
    part.with_name("part-copy.parquet").write_bytes(part.read_bytes())
    problems = " ".join(problems_of(place, expected))
    assert "has 2 rows" in problems
    assert "is no part of the plan" in problems


@pytest.mark.parametrize(
    ("column", "value"), [("text", "other"), ("status", "error"), ("tokens", [3]), ("words", []), ("id", "f" * 32)]
)
def test_another_row(column: str, value: Any, output: tuple[Place, Rows]) -> None:
    place, expected = output
    part = parts(place)[0]
    rows = pq.read_table(part).to_pylist()
    rows[0][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(part)), part)
    assert problems_of(place, expected)


def test_the_last_digit_of_a_confidence_may_differ(output: tuple[Place, Rows]) -> None:
    place, expected = output
    part = parts(place)[0]
    rows = pq.read_table(part).to_pylist()
    rows[0]["words"][0]["confidence"] += 1e-4
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(part)), part)
    assert problems_of(place, expected) == []
    rows[0]["words"][0]["confidence"] += 1e-3
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(part)), part)
    assert problems_of(place, expected)


def test_a_reader_tells_of_what_it_must_not_see(output: tuple[Place, Rows]) -> None:
    place, _ = output
    reader = Reader(place)
    reader.look()
    assert not reader.problems
    part, other, *_ = parts(place)
    copy = part.with_name("part-copy.parquet")
    copy.write_bytes(part.read_bytes())
    reader.look()
    assert any("twice" in problem for problem in reader.problems)
    copy.write_bytes(b"half")
    other.unlink()
    reader.look()
    assert any("cannot be read" in problem for problem in reader.problems)
    assert any("has gone" in problem for problem in reader.problems)
