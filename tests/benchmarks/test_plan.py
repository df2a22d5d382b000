import json
from pathlib import Path

import pytest

from benchmarks import plan
from pipeline.discover import discover
from pipeline.storage import Storage


def test_the_manifest_has_as_many_inputs_as_asked_for(tmp_path: Path) -> None:
    plan.write_manifest(tmp_path / "in.jsonl", 700)
    found = discover([f"{tmp_path}/in.jsonl"], Storage()).found
    assert len({one.source.id for one in found}) == 700
    assert len({one.source.file_uri for one in found}) == 3


def test_every_step_is_measured_and_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--inputs", "500"])
    plan.main()
    *shown, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["step"] for row in rows] == ["import", "plan", "plan again", "read back"]
    assert [row["planned"] for row in rows] == [0, 500, 500, 500]
    assert len(shown) == 4
