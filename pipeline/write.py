"""Transcript -> row -> one Parquet part per shard. Every input has exactly one row, failures included.

A part is built in memory and published with one create-only write: it appears whole or not at all, and the first
one stays. Its name follows from the shard, so a shard that is done twice still has one part. Only two things replace a
part, each with one write under the same name, so that a reader of the folder sees every input once at any moment:
other settings (the old part is kept in the archive), and inputs that are tried again because their rows are errors.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, SystemFailure
from pipeline.failpoints import failpoint
from pipeline.messages import Failure, Shard, Transcript, Word
from pipeline.storage import Storage, join

Row = dict[str, object]
# pa.Schema and pa.DataType; pyarrow ships no types.
PartSchema = Any
DataType = Any

_WORD = pa.struct([("word", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("confidence", pa.float32())])
_OPTIONAL_FIELDS = {
    "tokens": pa.field("tokens", pa.list_(pa.int32())),
    "codes": pa.field("codes", pa.list_(pa.list_(pa.int16()))),
}
_RESULT_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("source_uri", pa.string(), nullable=False),
    pa.field("content_sha256", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_code", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("duration_s", pa.float64()),
    pa.field("sampling_rate_in", pa.int32()),
    pa.field("channels", pa.int32()),
    pa.field("text", pa.string()),
    pa.field("words", pa.list_(_WORD)),
    pa.field("avg_logprob", pa.float32()),
)
_PROVENANCE_FIELDS = (
    pa.field("model_id", pa.string(), nullable=False),
    pa.field("model_revision", pa.string(), nullable=False),
    pa.field("config_fingerprint", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("transcribed_at", pa.timestamp("us", tz="UTC"), nullable=False),
)
# JSON allows these raw inside a string, but many readers end a line at them.
_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
_MAX_IDS_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which model, settings and run made a row; the same for every row of a run."""

    model_id: str
    model_revision: str
    config_fingerprint: str
    version: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """What a committed part holds, as its footer says."""

    shard_id: str
    num_rows: int
    num_ok: int
    errors: Mapping[str, int]  # error code -> rows
    audio_seconds: float  # of the ok rows
    version: str
    config_fingerprint: str
    columns: tuple[str, ...]  # the extra ones
    created: bool = False  # True only from the commit that put the part there


def part_uri(output_uri: str, shard_id: str) -> str:
    """Where the part of a shard is, or will be."""
    return join(output_uri, "data", f"part-{shard_id}.parquet")


def archive_uri(output_uri: str, shard_id: str, config_fingerprint: str) -> str:
    """Where the part of a shard is kept once one with other settings has taken its place."""
    return join(output_uri, "_kikitori", "archive", config_fingerprint, f"part-{shard_id}.replaced")


def check_columns(columns: Collection[str]) -> None:
    """Refuse extra columns that cannot be written.

    Raises:
        ConfigError: a column is unknown, or is `audio`, which is not available yet.
    """
    if "audio" in columns:
        raise ConfigError(
            "output.columns: audio cannot be written yet; leave it out, source_uri says where the audio is"
        )
    unknown = [column for column in columns if column not in _OPTIONAL_FIELDS]
    if unknown:
        known = ", ".join(_OPTIONAL_FIELDS)
        raise ConfigError(f"output.columns: found {', '.join(unknown)}; the extra columns are {known}")


def schema(columns: Collection[str] = ()) -> PartSchema:
    """The schema of every part, whatever its rows hold; its metadata tells Hugging Face `datasets` the features.

    Raises:
        ConfigError: as `check_columns`.
    """
    check_columns(columns)
    chosen = [field for name, field in _OPTIONAL_FIELDS.items() if name in columns]
    fields = [*_RESULT_FIELDS, *chosen, *_PROVENANCE_FIELDS]
    features = {field.name: _feature(field.type) for field in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def to_row(
    message: Transcript | Failure,
    provenance: Provenance,
    *,
    columns: Collection[str] = (),
    transcribed_at: datetime,
) -> Row:
    """One output row, its keys in the order of `schema(columns)`.

    `transcribed_at` needs a time zone. Numbers that are not finite become null: neither JSON nor SQL can count on them.
    """
    facts = message.facts
    return {
        "id": message.source.id,
        "source_uri": _printable(message.source.uri),
        "content_sha256": facts.content_sha256,
        **_outcome(message),
        "duration_s": _finite(facts.duration_seconds),
        "sampling_rate_in": facts.sampling_rate_hz,
        "channels": facts.channels,
        **_heard(message, columns),
        "model_id": provenance.model_id,
        "model_revision": provenance.model_revision,
        "config_fingerprint": provenance.config_fingerprint,
        "version": provenance.version,
        "run_id": provenance.run_id,
        "transcribed_at": transcribed_at,
    }


def row_to_json(row: Mapping[str, object]) -> str:
    """One line of JSON without its line end; times are ISO 8601, letters are not escaped."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_json_value).translate(_LINE_ENDS)


def read_summary(storage: Storage, uri: str) -> PartSummary:
    """What a part holds, from its footer alone.

    Raises:
        SystemFailure: the file is damaged, or was not written by this project.
    """
    try:
        with storage.open(uri) as file:
            return _summary_of(pq.ParquetFile(file), uri)
    except pa.ArrowInvalid as error:
        raise _damaged(uri, error) from None


def read_error_ids(storage: Storage, uri: str, codes: Collection[str]) -> frozenset[str]:
    """The ids of the rows of a part that carry one of these error codes."""
    try:
        with storage.open(uri) as file:
            rows = pq.ParquetFile(file).read(["id", "error_code"]).to_pylist()
    except pa.ArrowInvalid as error:
        raise _damaged(uri, error) from None
    return frozenset(row["id"] for row in rows if row["error_code"] in codes)


class WriteStage:
    """The last stage: makes rows, and commits the rows of a shard as one part."""

    def __init__(
        self,
        storage: Storage,
        output_uri: str,
        provenance: Provenance,
        *,
        columns: Collection[str] = (),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises ConfigError as `check_columns`."""
        self._storage = storage
        self._output_uri = output_uri
        self._provenance = provenance
        self._columns = frozenset(columns)
        self._schema = schema(self._columns)
        self._clock = clock

    def run(self, inbox: Iterable[Transcript | Failure]) -> Iterator[Row]:
        """One row per message, as they come; nothing is written."""
        for message in inbox:
            yield to_row(message, self._provenance, columns=self._columns, transcribed_at=self._clock())

    def commit(
        self,
        shard: Shard,
        messages: Iterable[Transcript | Failure],
        *,
        check_replaceable: Callable[[PartSummary], None] = lambda _: None,
    ) -> PartSummary:
        """Write the part of a shard, or leave it as it is if somebody wrote it before with the same settings.

        A part with other settings is copied to the archive and replaced, unless `check_replaceable` raises. The summary
        is of the part that is there afterwards; `created` says whether it is this one.

        Raises:
            SystemFailure: the messages are not exactly one per source of the shard; nothing is written.
        """
        rows = _in_order_of(shard, list(self.run(messages)))
        summary = self._summarise(shard.id, rows)
        data = _parquet(pa.Table.from_pylist(rows, schema=self._schema), summary)
        uri = part_uri(self._output_uri, shard.id)
        failpoint("write.before-put")
        if self._storage.create(uri, data):
            failpoint("write.after-put")
            return summary
        there = read_summary(self._storage, uri)
        if self.made(there):
            return there
        check_replaceable(there)
        archived = archive_uri(self._output_uri, shard.id, there.config_fingerprint)
        failpoint("write.before-archive")
        self._storage.overwrite(archived, self._storage.read_bytes(uri))
        failpoint("write.before-replace")
        self._storage.overwrite(uri, data)
        failpoint("write.after-replace")
        return summary

    def amend(self, shard: Shard, messages: Iterable[Transcript | Failure]) -> PartSummary:
        """Put new rows in the place of error rows of a part; all other rows stay as they are, to the bit.

        The part is read again for that: a row which another run has brought to ok meanwhile is such another row.

        Raises:
            SystemFailure: the part is not of these settings, or does not hold the inputs of the shard.
        """
        uri = part_uri(self._output_uri, shard.id)
        part = pq.ParquetFile(pa.BufferReader(self._storage.read_bytes(uri)))
        if not self.made(_summary_of(part, uri)):
            raise SystemFailure(
                f"{uri} was replaced by a run with other settings meanwhile; run again to see what is left"
            )
        there = part.read()
        errors = {row["id"] for row in there.select(["id", "status"]).to_pylist() if row["status"] == "error"}
        rows = {str(row["id"]): row for row in self.run(messages) if row["id"] in errors}
        kept = there.filter([id not in rows for id in there["id"].to_pylist()])
        merged = pa.concat_tables([kept.cast(self._schema), pa.Table.from_pylist(list(rows.values()), self._schema)])
        merged = merged.take(_places(shard, merged["id"].to_pylist()))
        summary = self._summarise(shard.id, merged.select(["status", "error_code", "duration_s"]).to_pylist())
        failpoint("write.before-amend")
        self._storage.overwrite(uri, _parquet(merged, summary))
        failpoint("write.after-amend")
        return summary

    def made(self, part: PartSummary) -> bool:
        """Whether a part was made with the settings of this stage and has its columns."""
        same_settings = part.config_fingerprint == self._provenance.config_fingerprint
        return same_settings and self._columns == frozenset(part.columns)

    def _summarise(self, shard_id: str, rows: Sequence[Row]) -> PartSummary:
        ok = [row for row in rows if row["status"] == "ok"]
        seconds = [row["duration_s"] for row in ok]
        return PartSummary(
            shard_id=shard_id,
            num_rows=len(rows),
            num_ok=len(ok),
            errors=dict(sorted(Counter(str(row["error_code"]) for row in rows if row["status"] == "error").items())),
            audio_seconds=math.fsum(value for value in seconds if isinstance(value, float)),
            version=self._provenance.version,
            config_fingerprint=self._provenance.config_fingerprint,
            columns=tuple(name for name in _OPTIONAL_FIELDS if name in self._columns),
            created=True,
        )


def _outcome(message: Transcript | Failure) -> Row:
    if isinstance(message, Transcript):
        return {"status": "ok", "error_code": None, "error_stage": None, "error_message": None}
    return {
        "status": "error",
        "error_code": message.code,
        "error_stage": message.stage,
        "error_message": _printable(message.message),
    }


def _heard(message: Transcript | Failure, columns: Collection[str]) -> Row:
    if isinstance(message, Failure):
        asked = dict.fromkeys(name for name in _OPTIONAL_FIELDS if name in columns)
        return {"text": None, "words": None, "avg_logprob": None, **asked}
    row: Row = {
        "text": message.text,
        "words": [_word(word) for word in message.words],
        "avg_logprob": _finite(message.avg_logprob),
    }
    if "tokens" in columns:
        row["tokens"] = message.ids.tolist()
    if "codes" in columns:
        assert message.codes is not None, "the codes column was asked for, but the stages before did not keep the codes"
        row["codes"] = message.codes.T.tolist()  # [K, T] -> [T frames][K codebooks]
    return row


def _word(word: Word) -> Row:
    return {
        "word": word.text,
        "start": _finite(word.start_seconds),
        "end": _finite(word.end_seconds),
        "confidence": _finite(word.confidence),
    }


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _printable(text: str) -> str:
    # A file name need not be UTF-8; Python holds its odd bytes as lone surrogates, which Parquet and JSON refuse.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _json_value(value: object) -> str:
    assert isinstance(value, datetime), f"a row holds a {type(value).__name__}"
    return value.isoformat()


def _feature(kind: DataType) -> object:
    # A list is written `[feature]`: the one form that both old and new releases of `datasets` read as a plain list.
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    if pa.types.is_struct(kind):
        return {kind.field(index).name: _feature(kind.field(index).type) for index in range(kind.num_fields)}
    names = {pa.float64(): "float64", pa.float32(): "float32"}  # pyarrow prints `double` and `float`
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


def _in_order_of(shard: Shard, rows: Sequence[Row]) -> list[Row]:
    return [rows[place] for place in _places(shard, [str(row["id"]) for row in rows])]


def _places(shard: Shard, ids: Sequence[str]) -> list[int]:
    """Where the row of each source is, in the order of the shard."""
    planned = [source.id for source in shard.sources]
    times_seen = Counter(ids)
    problems = {
        "missing": [id for id in planned if id not in times_seen],
        "more than once": [id for id, times in times_seen.items() if times > 1],
        "not of this shard": sorted(times_seen.keys() - set(planned)),
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_name_some(ids)}" for what, ids in problems.items() if ids)
        raise SystemFailure(f"shard {shard.id} has {len(planned)} inputs and got {len(ids)} results; {found}")
    place_of = {id: place for place, id in enumerate(ids)}
    return [place_of[id] for id in planned]


def _name_some(ids: Sequence[str]) -> str:
    more = len(ids) - _MAX_IDS_NAMED
    return ", ".join(ids[:_MAX_IDS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _summary_of(part: Any, uri: str) -> PartSummary:
    """Of an open Parquet file."""
    metadata: Mapping[bytes, bytes] = part.metadata.metadata or {}
    if b"kikitori" not in metadata:
        raise SystemFailure(f"{uri} was not written by kikitori; move it out of the output folder")
    counts: dict[str, Any] = json.loads(metadata[b"kikitori"])
    return PartSummary(
        shard_id=counts["shard_id"],
        num_rows=counts["rows"],
        num_ok=counts["ok"],
        errors=counts["errors"],
        audio_seconds=counts["audio_seconds"],
        version=counts["version"],
        # The first releases did not write it into the footer; a part is of one run, so any row can tell.
        config_fingerprint=counts.get("config_fingerprint") or _fingerprint_in_rows(part),
        columns=tuple(name for name in part.schema_arrow.names if name in _OPTIONAL_FIELDS),
    )


def _fingerprint_in_rows(part: Any) -> str:
    return str(part.read_row_group(0, columns=["config_fingerprint"])["config_fingerprint"][0])


def _damaged(uri: str, error: Exception) -> SystemFailure:
    return SystemFailure(f"{uri} is damaged: {error}; delete it, and its shard will be done again")


def _parquet(table: Any, summary: PartSummary) -> bytes:
    counts = {
        "shard_id": summary.shard_id,
        "rows": summary.num_rows,
        "ok": summary.num_ok,
        "errors": dict(summary.errors),
        "audio_seconds": summary.audio_seconds,
        "version": summary.version,
        "config_fingerprint": summary.config_fingerprint,
    }
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"kikitori": json.dumps(counts)})
    return sink.getvalue()
