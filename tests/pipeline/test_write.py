import json
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ERROR_CODES, ConfigError, SystemFailure
from pipeline.messages import AudioFacts, Failure, Shard, Source, Transcript, Word
from pipeline.storage import Storage
from pipeline.write import (
    Provenance,
    WriteStage,
    archive_uri,
    check_columns,
    part_uri,
    read_error_ids,
    read_summary,
    row_to_json,
    schema,
    to_row,
)

NOW = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
PROVENANCE = Provenance(
    model_id="demo", model_revision="abc", config_fingerprint="0123456789abcdef", version="0.1.0", run_id="r1"
)
CONTRACT_COLUMNS = [
    *("id", "source_uri", "content_sha256", "status", "error_code", "error_stage", "error_message"),
    *("duration_s", "sampling_rate_in", "channels", "text", "words", "avg_logprob"),
    *("model_id", "model_revision", "config_fingerprint", "version", "run_id", "transcribed_at"),
]


def make_source(number: int) -> Source:
    return Source(id=f"{number:032x}", uri=f"s3://bucket/{number}.wav", size_bytes=number)


def make_shard(num_sources: int, *, shard_id: str = "00000000deadbeef") -> Shard:
    return Shard(id=shard_id, sources=tuple(make_source(n) for n in range(num_sources)), estimated_seconds=1.0)


def make_transcript(source: Source, *, text: str = "hello world", seconds: float = 2.0) -> Transcript:
    words = tuple(
        Word(text=word, start_seconds=n * 0.5, end_seconds=n * 0.5 + 0.4, confidence=0.75)
        for n, word in enumerate(text.split())
    )
    return Transcript(
        source=source,
        facts=AudioFacts(content_sha256="f" * 64, duration_seconds=seconds, sampling_rate_hz=16000, channels=2),
        text=text,
        words=words,
        avg_logprob=-0.25 if words else None,
        ids=np.array([3, 0, 17, 2], dtype=np.int32),
        codes=np.arange(6, dtype=np.int16).reshape(2, 3),
    )


def make_failure(source: Source, *, code: str = "TRUNCATED", message: str = "half of it is missing") -> Failure:
    return Failure(
        source=source, stage="load", code=code, message=message, facts=AudioFacts(duration_seconds=1.0, channels=1)
    )


def make_stage(
    output: Path, *, columns: tuple[str, ...] = (), fingerprint: str = "0123456789abcdef", run_id: str = "r1"
) -> WriteStage:
    provenance = replace(PROVENANCE, config_fingerprint=fingerprint, run_id=run_id)
    return WriteStage(Storage(), str(output), provenance, columns=columns, clock=lambda: NOW)


def read_part(output: Path, shard: Shard) -> list[dict[str, object]]:
    return pq.read_table(part_uri(str(output), shard.id)).to_pylist()


@pytest.mark.parametrize("num_sources", [1, 2, 7])
def test_every_input_has_one_row_in_the_order_of_the_shard(tmp_path: Path, num_sources: int) -> None:
    shard = make_shard(num_sources)
    messages = [make_failure(s) if n % 3 == 1 else make_transcript(s) for n, s in enumerate(shard.sources)]
    make_stage(tmp_path).commit(shard, reversed(messages))
    assert [row["id"] for row in read_part(tmp_path, shard)] == [source.id for source in shard.sources]


def test_a_row_has_the_columns_of_the_contract_in_their_order() -> None:
    transcript = make_transcript(make_source(1))
    row = to_row(transcript, PROVENANCE, transcribed_at=NOW)
    assert list(row) == CONTRACT_COLUMNS == schema().names
    with_tokens = to_row(transcript, PROVENANCE, columns=("codes", "tokens"), transcribed_at=NOW)
    where = CONTRACT_COLUMNS.index("avg_logprob") + 1
    assert list(with_tokens) == [*CONTRACT_COLUMNS[:where], "tokens", "codes", *CONTRACT_COLUMNS[where:]]
    assert list(with_tokens) == schema(("tokens", "codes")).names


def test_types_are_those_of_the_contract() -> None:
    fields = schema(("tokens", "codes"))
    word = pa.struct({"word": pa.string(), "start": pa.float64(), "end": pa.float64(), "confidence": pa.float32()})
    assert fields.field("words").type == pa.list_(word)
    assert fields.field("avg_logprob").type == pa.float32()
    assert fields.field("duration_s").type == pa.float64()
    assert fields.field("sampling_rate_in").type == pa.int32()
    assert fields.field("tokens").type == pa.list_(pa.int32())
    assert fields.field("codes").type == pa.list_(pa.list_(pa.int16()))
    assert fields.field("transcribed_at").type == pa.timestamp("us", tz="UTC")
    required = {"id", "source_uri", "status", *CONTRACT_COLUMNS[-6:]}
    assert {field.name for field in fields if not field.nullable} == required


def test_an_error_row_says_what_happened_and_holds_no_text() -> None:
    row = to_row(make_failure(make_source(1)), PROVENANCE, transcribed_at=NOW)
    assert (row["status"], row["error_code"], row["error_stage"]) == ("error", "TRUNCATED", "load")
    assert row["error_message"] == "half of it is missing"
    assert row["text"] is None
    assert row["words"] is None
    assert (row["duration_s"], row["channels"], row["sampling_rate_in"]) == (1.0, 1, None)


def test_silence_is_an_ok_row_with_empty_text() -> None:
    row = to_row(make_transcript(make_source(1), text=""), PROVENANCE, transcribed_at=NOW)
    assert (row["status"], row["text"], row["words"], row["avg_logprob"]) == ("ok", "", [], None)
    assert row["error_code"] is row["error_stage"] is row["error_message"] is None


def test_words_tokens_and_codes_survive_the_file(tmp_path: Path) -> None:
    shard = make_shard(2)
    done, failed = make_transcript(shard.sources[0]), make_failure(shard.sources[1])
    make_stage(tmp_path, columns=("tokens", "codes")).commit(shard, [done, failed])
    first, second = read_part(tmp_path, shard)
    assert first["words"] == [
        {"word": "hello", "start": 0.0, "end": 0.4, "confidence": 0.75},
        {"word": "world", "start": 0.5, "end": 0.9, "confidence": 0.75},
    ]
    assert first["tokens"] == [3, 0, 17, 2]
    assert first["codes"] == [[0, 3], [1, 4], [2, 5]]  # [T frames][K codebooks]
    assert first["transcribed_at"] == NOW
    assert second["tokens"] is None
    assert second["codes"] is None


def test_a_second_commit_of_a_shard_changes_nothing(tmp_path: Path) -> None:
    shard = make_shard(2)
    first = make_stage(tmp_path).commit(shard, [make_transcript(source) for source in shard.sources])
    part = Path(part_uri(str(tmp_path), shard.id))
    before = part.read_bytes()
    second = make_stage(tmp_path).commit(shard, [make_failure(source) for source in shard.sources])
    assert (first.created, second.created) == (True, False)
    assert part.read_bytes() == before
    assert (second.num_ok, dict(second.errors)) == (2, {})  # what is committed, not what lost


def test_other_settings_replace_the_part_and_keep_the_old_one(tmp_path: Path) -> None:
    shard = make_shard(2)
    part = Path(part_uri(str(tmp_path), shard.id))
    make_stage(tmp_path, fingerprint="old").commit(shard, [make_failure(source) for source in shard.sources])
    before = part.read_bytes()
    new = make_stage(tmp_path, fingerprint="new")
    summary = new.commit(shard, [make_transcript(source) for source in shard.sources])
    assert (summary.created, summary.num_ok, summary.config_fingerprint) == (True, 2, "new")
    assert {row["config_fingerprint"] for row in read_part(tmp_path, shard)} == {"new"}
    assert Path(archive_uri(str(tmp_path), shard.id, "old")).read_bytes() == before
    assert [path.name for path in part.parent.iterdir()] == [part.name]
    assert not new.commit(shard, [make_failure(source) for source in shard.sources]).created


def test_other_columns_are_another_version_too(tmp_path: Path) -> None:
    shard = make_shard(1)
    messages = [make_transcript(shard.sources[0])]
    make_stage(tmp_path).commit(shard, messages)
    assert make_stage(tmp_path, columns=("tokens",)).commit(shard, messages).columns == ("tokens",)
    assert read_part(tmp_path, shard)[0]["tokens"] == [3, 0, 17, 2]
    assert Path(archive_uri(str(tmp_path), shard.id, PROVENANCE.config_fingerprint)).exists()


@given(
    before=st.lists(st.sampled_from(["", "TRUNCATED", "NOT_FOUND"]), min_size=1, max_size=6),
    outcomes=st.lists(st.booleans(), min_size=6, max_size=6),
    columns=st.sampled_from([(), ("tokens", "codes")]),
)
def test_retried_rows_take_the_place_of_errors_and_all_others_stay_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], outcomes: list[bool], columns: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("out")
    shard = make_shard(len(before))
    uri = part_uri(str(folder), shard.id)
    make_stage(folder, columns=columns).commit(
        shard,
        [
            make_failure(source, code=code) if code else make_transcript(source, seconds=math.nan, text="")
            for source, code in zip(shard.sources, before, strict=True)
        ],
    )
    old = pq.read_table(uri)
    ids = read_error_ids(Storage(), uri, {"NOT_FOUND"})
    assert ids == {source.id for source, code in zip(shard.sources, before, strict=True) if code == "NOT_FOUND"}
    again = [source for source in shard.sources if source.id in ids]
    messages = [make_transcript(s) if good else make_failure(s) for s, good in zip(again, outcomes, strict=False)]
    summary = make_stage(folder, columns=columns, run_id="r2").amend(shard, reversed(messages))
    new = pq.read_table(uri)
    assert pq.read_schema(uri).equals(schema(columns))
    assert new["id"].to_pylist() == [source.id for source in shard.sources]
    for place, source in enumerate(shard.sources):
        if source.id in ids:
            assert new["run_id"][place].as_py() == "r2"
        else:
            assert new.slice(place, 1).equals(old.slice(place, 1))
    counted = read_summary(Storage(), uri)
    assert summary == replace(counted, created=True)
    assert counted.num_ok == new["status"].to_pylist().count("ok")
    assert sum(counted.errors.values()) == len(before) - counted.num_ok


def test_a_row_that_another_run_has_brought_to_ok_meanwhile_stays(tmp_path: Path) -> None:
    shard = make_shard(2)
    make_stage(tmp_path).commit(shard, [make_failure(source) for source in shard.sources])
    make_stage(tmp_path, run_id="theirs").amend(shard, [make_transcript(shard.sources[0])])
    ours = [make_failure(shard.sources[0]), make_transcript(shard.sources[1])]
    assert make_stage(tmp_path, run_id="ours").amend(shard, ours).num_ok == 2
    assert [row["run_id"] for row in read_part(tmp_path, shard)] == ["theirs", "ours"]


def test_a_part_with_other_settings_is_not_amended(tmp_path: Path) -> None:
    shard = make_shard(1)
    make_stage(tmp_path, fingerprint="other").commit(shard, [make_failure(shard.sources[0])])
    with pytest.raises(SystemFailure, match="was replaced by a run with other settings"):
        make_stage(tmp_path).amend(shard, [make_transcript(shard.sources[0])])
    with pytest.raises(SystemFailure, match="missing"):
        make_stage(tmp_path, fingerprint="other").amend(make_shard(2), [make_transcript(make_source(0))])


def test_parts_of_the_first_releases_count_by_their_rows(tmp_path: Path) -> None:
    shard = make_shard(1)
    make_stage(tmp_path).commit(shard, [make_transcript(shard.sources[0])])
    uri = part_uri(str(tmp_path), shard.id)
    table, counts = pq.read_table(uri), json.loads(pq.read_metadata(uri).metadata[b"kikitori"])
    del counts["config_fingerprint"]
    with pq.ParquetWriter(uri, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"kikitori": json.dumps(counts)})
    assert read_summary(Storage(), uri).config_fingerprint == PROVENANCE.config_fingerprint


@pytest.mark.parametrize(
    ("numbers", "named"),
    [([0, 1], [2]), ([0, 1, 2, 2], [2]), ([0, 1, 2, 9], [9]), ([0, 0, 9], [0, 1, 2, 9])],
    ids=["missing", "twice", "foreign", "all"],
)
def test_a_shard_that_does_not_add_up_is_not_committed(tmp_path: Path, numbers: list[int], named: list[int]) -> None:
    shard = make_shard(3)
    with pytest.raises(SystemFailure) as caught:
        make_stage(tmp_path).commit(shard, [make_transcript(make_source(n)) for n in numbers])
    assert all(make_source(n).id in str(caught.value) for n in named)
    assert not Path(part_uri(str(tmp_path), shard.id)).exists()


def test_the_footer_counts_what_the_part_holds(tmp_path: Path) -> None:
    shard = make_shard(5)
    messages: list[Transcript | Failure] = [make_transcript(source, seconds=1.5) for source in shard.sources[:2]]
    messages += [make_failure(source, code="NOT_FOUND") for source in shard.sources[2:4]]
    messages += [make_failure(shard.sources[4])]
    written = make_stage(tmp_path).commit(shard, messages)
    uri = part_uri(str(tmp_path), shard.id)
    counted = read_summary(Storage(), uri)
    assert (counted.shard_id, counted.num_rows, counted.num_ok) == (shard.id, 5, 2)
    assert dict(counted.errors) == {"NOT_FOUND": 2, "TRUNCATED": 1}
    assert counted.audio_seconds == 3.0
    assert counted.version == "0.1.0"
    assert (written.num_rows, written.num_ok, written.errors) == (counted.num_rows, counted.num_ok, counted.errors)
    assert json.loads(pq.read_metadata(uri).metadata[b"kikitori"])["errors"] == {"NOT_FOUND": 2, "TRUNCATED": 1}


@pytest.mark.parametrize("content", ["foreign", "damaged"])
def test_a_file_that_is_not_our_part_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "part-x.parquet"
    if content == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(b"PAR1 not really")
    with pytest.raises(SystemFailure, match=r"part-x\.parquet"):
        read_summary(Storage(), str(path))


def commit_three_kinds(output: Path, *, columns: tuple[str, ...] = ()) -> None:
    ok, bad, mixed = (make_shard(2, shard_id=f"{n:016x}") for n in range(3))
    stage = make_stage(output, columns=columns)
    stage.commit(ok, [make_transcript(source) for source in ok.sources])
    stage.commit(bad, [make_failure(source) for source in bad.sources])
    stage.commit(mixed, [make_transcript(mixed.sources[0], text=""), make_failure(mixed.sources[1])])


@pytest.mark.parametrize("columns", [(), ("tokens",), ("tokens", "codes")])
def test_parts_read_as_one_dataset_whatever_they_hold(tmp_path: Path, columns: tuple[str, ...]) -> None:
    commit_three_kinds(tmp_path, columns=columns)
    parts = sorted((tmp_path / "data").iterdir())
    assert len(parts) == 3
    assert all(pq.read_schema(part).equals(schema(columns)) for part in parts)
    table = pq.read_table(tmp_path / "data")
    assert table.num_rows == 6
    assert sorted(table["status"].to_pylist()) == ["error", "error", "error", "ok", "ok", "ok"]


def test_duckdb_reads_the_folder(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    commit_three_kinds(tmp_path)
    rows = duckdb.sql(f"select status, count(*) from '{tmp_path}/data/*.parquet' group by 1 order by 1").fetchall()
    assert rows == [("error", 3), ("ok", 3)]


def test_pandas_reads_the_folder(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    commit_three_kinds(tmp_path)
    assert len(pandas.read_parquet(tmp_path / "data")) == 6


def test_every_part_tells_datasets_its_features(tmp_path: Path) -> None:
    shard = make_shard(1)
    make_stage(tmp_path, columns=("tokens", "codes")).commit(shard, [make_transcript(shard.sources[0])])
    metadata = pq.read_metadata(part_uri(str(tmp_path), shard.id)).metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema(("tokens", "codes")).names
    assert features["id"] == {"dtype": "string", "_type": "Value"}
    assert features["transcribed_at"] == {"dtype": "timestamp[us, tz=UTC]", "_type": "Value"}
    assert features["words"][0]["confidence"] == {"dtype": "float32", "_type": "Value"}
    assert features["codes"] == [[{"dtype": "int16", "_type": "Value"}]]


def test_columns_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    check_columns(["tokens", "codes"])
    with pytest.raises(ConfigError, match="audio"):
        check_columns(["tokens", "audio"])
    with pytest.raises(ConfigError, match="phonemes"):
        make_stage(tmp_path, columns=("phonemes",))


def test_the_one_process_path_gives_the_rows_of_the_part(tmp_path: Path) -> None:
    shard = make_shard(2)
    messages = [make_transcript(shard.sources[0]), make_failure(shard.sources[1])]
    stage = make_stage(tmp_path)
    stage.commit(shard, messages)
    assert list(stage.run(messages)) == read_part(tmp_path, shard)


def test_a_row_is_made_as_soon_as_its_message_arrives(tmp_path: Path) -> None:
    taken: list[int] = []

    def inbox() -> Iterator[Transcript]:
        for number in range(3):
            taken.append(number)
            yield make_transcript(make_source(number))

    next(make_stage(tmp_path).run(inbox()))
    assert taken == [0]


@given(text=st.text(), logprob=st.one_of(st.none(), st.floats()), code=st.sampled_from(sorted(ERROR_CODES)))
def test_a_json_line_is_one_line_and_says_what_the_row_says(text: str, logprob: float | None, code: str) -> None:
    transcript = make_transcript(make_source(1))
    heard = Transcript(
        source=transcript.source,
        facts=transcript.facts,
        text=text,
        words=(Word(text=text, start_seconds=0.0, end_seconds=math.inf, confidence=math.nan),),
        avg_logprob=logprob,
        ids=transcript.ids,
        codes=transcript.codes,
    )
    failure = make_failure(make_source(2), code=code, message=text)
    for message in (heard, failure):
        row = to_row(message, PROVENANCE, columns=("tokens", "codes"), transcribed_at=NOW)
        line = row_to_json(row)
        assert len(line.splitlines()) == 1
        assert json.loads(line, parse_constant=pytest.fail) == {**row, "transcribed_at": NOW.isoformat()}


def test_json_keeps_letters_readable() -> None:
    row = to_row(make_transcript(make_source(1), text="déjà 聞き取り"), PROVENANCE, transcribed_at=NOW)
    assert '"text": "déjà 聞き取り"' in row_to_json(row)
    assert '"transcribed_at": "2026-03-04T05:06:07.000089+00:00"' in row_to_json(row)


def test_a_file_name_that_is_not_utf8_still_gets_its_row(tmp_path: Path) -> None:
    source = Source(id="0" * 32, uri="/audio/caf\udce9.wav")
    shard = Shard(id="0" * 16, sources=(source,), estimated_seconds=0.0)
    make_stage(tmp_path).commit(shard, [make_failure(source, message="cannot read /audio/caf\udce9.wav")])
    (row,) = read_part(tmp_path, shard)
    assert row["source_uri"] == r"/audio/caf\udce9.wav"
    row_to_json(row).encode()
