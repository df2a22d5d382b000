"""The script prints a table and, last, one JSON object; it needs no library beyond those of the engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine import main, table

ROOT = Path(__file__).parent.parent.parent
FOREIGN = ("ray", "av", "soxr", "pydantic", "yaml", "pyarrow", "fsspec", "click", "rich", "transformers", "moshi")


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--shape", "tiny", "--slots", "2,3", "--lookahead", "1,2", "--clips", "4", "--seconds", "2", "--repeats", "2"]
    )
    *shown, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert [(row["slots"], row["lookahead"]) for row in facts["engine"]] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert all(len(row["wall_seconds"]) == 2 for row in facts["engine"])
    assert len(shown) == 1 + 2 + 4
    assert 0 < facts["credited_seconds"] < facts["step_seconds"]


def test_one_setting_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--shape", "tiny", "--slots", "2", "--lookahead", "2", "--profile"])
    *shown, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert facts["profile"]["products"] > 0
    assert facts["profile"]["pass_ms"] > 0
    assert len(shown) == 1 + 2 + len(facts["profile"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--profile"], "one setting"), (["--device", "cpu", "--graphs", "on"], "no CUDA graphs")],
)
def test_what_cannot_be_is_refused(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "tiny", *options])
    assert complaint in capsys.readouterr().err


def test_columns_are_aligned() -> None:
    assert table([("a", "bcd"), ("10", "2")]).splitlines() == ["|  a | bcd |", "|---:|----:|", "| 10 |   2 |"]


def test_a_machine_with_little_installed_is_enough() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r}));"
    program = blocked + "import benchmarks.engine"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
