"""What must be true of an output: while it is written to, and when the command has come to its end."""

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifests import load_shard
from pipeline.plan import read_plan
from pipeline.status import work_of
from pipeline.storage import Storage, join
from pipeline.versions import read_versions
from tests.crash.world import Place

# What must not depend on what died when.
_COLUMNS = (
    "id",
    "source_uri",
    "content_sha256",
    "status",
    "error_code",
    "error_stage",
    "duration_s",
    "sampling_rate_in",
    "channels",
    "text",
    "tokens",
)
_CONFIDENCE = 2e-4  # it has four digits; what is beyond them depends on who shares a pass, and can flip the last one
CRASHED = ("WORKER_CRASHED", "MODEL_ERROR")

Rows = dict[str, dict[str, Any]]


class Reader:
    """Somebody who reads `data/*.parquet` while the run goes on."""

    def __init__(self, place: Place) -> None:
        self._storage = Storage(place.direct_options)
        self._folder = join(place.output_uri, "data")
        self._ids: dict[str, list[str]] = {}
        self._versions: dict[str, str] = {}
        self.problems: set[str] = set()
        self.num_looks = 0

    def look(self) -> None:
        """Every part that is there is whole, no input is in two of them, and no part goes away."""
        self.num_looks += 1
        if not self._storage.is_folder(self._folder):
            return
        there = {entry.uri: entry.version for entry in self._storage.list_files(self._folder)}
        there = {uri: version for uri, version in there.items() if uri.endswith(".parquet")}
        self.problems |= {f"{uri} has gone" for uri in self._ids.keys() - there.keys()}
        for uri in [uri for uri, version in there.items() if self._versions.get(uri) != version]:
            try:
                table = pq.read_table(pa.BufferReader(self._storage.read_bytes(uri)), columns=["id"])
            except (OSError, pa.ArrowInvalid) as error:
                self.problems.add(f"{uri} cannot be read: {error}")
                continue
            self._ids[uri], self._versions[uri] = table["id"].to_pylist(), there[uri]
        twice = [id for id, times in Counter(id for ids in self._ids.values() for id in ids).items() if times > 1]
        self.problems |= {f"a reader sees {id} twice" for id in twice}


def read_rows(place: Place) -> list[dict[str, Any]]:
    """All rows of the output, in no order."""
    storage, folder = Storage(place.direct_options), join(place.output_uri, "data")
    if not storage.is_folder(folder):
        return []
    uris = [entry.uri for entry in storage.list_files(folder) if entry.uri.endswith(".parquet")]
    return [row for uri in uris for row in pq.read_table(pa.BufferReader(storage.read_bytes(uri))).to_pylist()]


def by_id(rows: list[dict[str, Any]]) -> Rows:
    """Rows by the id of their input."""
    return {row["id"]: row for row in rows}


def problems_of(place: Place, expected: Rows) -> list[str]:
    """Everything that is wrong with a complete output."""
    rows = read_rows(place)
    times = Counter(row["id"] for row in rows)
    found = by_id(rows)
    problems = [f"{id} has {count} rows" for id, count in times.items() if count > 1]
    problems += [f"{expected[id]['source_uri']} has no row" for id in expected.keys() - found.keys()]
    problems += [f"{found[id]['source_uri']} is no input" for id in found.keys() - expected.keys()]
    for id in expected.keys() & found.keys():
        problems += _differences(expected[id], found[id])
    return [*problems, *_disagreements(place)]


def num_crashed(rows: list[dict[str, Any]]) -> int:
    """Rows that blame their input for a death."""
    return sum(row["error_code"] in CRASHED for row in rows)


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    name = PurePosixPath(expected["source_uri"]).name
    unlike = [
        f"{name}: {column} is {found[column]!r:.80}, not {expected[column]!r:.80}"
        for column in _COLUMNS
        if found[column] != expected[column]
    ]
    words, others = expected["words"] or [], found["words"] or []
    same = len(words) == len(others) and all(_same_word(*pair) for pair in zip(words, others, strict=True))
    return unlike if same else [*unlike, f"{name}: other words"]


def _same_word(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    exact = all(one[key] == other[key] for key in ("word", "start", "end"))
    return exact and abs(one["confidence"] - other["confidence"]) < _CONFIDENCE


def _disagreements(place: Place) -> list[str]:
    """Between the plan and the parts; and what does not belong into the folder of parts."""
    storage = Storage(place.direct_options)
    plan = read_plan(place.output_uri, storage)
    problems: list[str] = []
    planned: set[str] = set()
    for ref in plan.shards:
        uri = join(place.output_uri, "data", f"part-{ref.id}.parquet")
        planned.add(uri)
        if not storage.exists(uri):
            problems.append(f"shard {ref.id} has no part")
            continue
        ids = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["id"])["id"].to_pylist()
        if ids != [source.id for source in load_shard(ref, storage).sources]:
            problems.append(f"part {ref.id} does not hold what is planned for it, in that order")
    there = {entry.uri for entry in storage.list_files(join(place.output_uri, "data"))}  # hidden files left out
    problems += [f"{uri} is no part of the plan" for uri in there - planned]
    versions = read_versions(place.output_uri, storage)
    left = work_of(plan, place.output_uri, storage, versions=versions).shards
    return [*problems, *(f"shard {shard.id} is still to be done" for shard in left)]
