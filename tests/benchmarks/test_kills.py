"""The comparison at the end of a job that was killed sees what it must see."""

import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.kills import problems_of, write_inputs
from tests.s3 import S3Server


def row(id: str, text: str = "one two", end: float = 0.5, status: str = "ok") -> dict[str, Any]:
    words = [{"word": word, "start": 0.0, "end": end, "confidence": 0.9} for word in text.split()]
    return {"id": id, "text": text, "words": words, "status": status, "error_code": None}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([row("a"), row("b")], None),
        ([row("b"), row("a")], None),
        ([row("a")], "b: no row"),
        ([row("a"), row("b"), row("b")], "b: 2 rows"),
        ([row("a"), row("b"), row("c")], "c: is no input"),
        ([row("a"), row("b", text="one three")], "b: text is 'one three'"),
        ([row("a"), row("b", end=0.500001)], "b: words is"),
        ([row("a"), row("b", status="error")], "b: status is 'error'"),
    ],
)
def test_what_is_lost_doubled_or_different_is_named(found: list[dict[str, Any]], problem: str | None) -> None:
    problems = problems_of([row("a"), row("b")], found)
    assert bool(problems) == bool(problem)
    assert problem is None or any(line.startswith(problem) for line in problems)


def test_both_forms_hold_the_same_clips(s3_server: S3Server) -> None:
    import fsspec

    folder, parquet = (write_inputs(s3_server, form, 103, seed=3) for form in ("folder", "parquet"))
    filesystem: Any = fsspec.filesystem("s3", **s3_server.options())
    files = [filesystem.cat_file(path) for path in sorted(filesystem.find(folder))]
    table = pq.read_table(parquet.removeprefix("s3://"), filesystem=filesystem)
    assert [cell["bytes"] for cell in table["audio"].to_pylist()] == files
    assert len(files) == 103
    assert sum(file.startswith(b"no audio") for file in files) == 2
    assert "huggingface" in json.dumps([key.decode() for key in table.schema.metadata])
