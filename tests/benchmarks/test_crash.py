import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash import summarise

ROOT = Path(__file__).parent.parent.parent


def outcome(seed: int, *, problems: list[str]) -> dict[str, Any]:
    return {
        "seed": seed,
        "problems": problems,
        "seconds": 2.0 + seed,
        "codes": [1, 1],
        "struck": ["write.before-put:kill@2", "driver:TERM"],
        "schedule": {"story": "fresh", "on_s3": bool(seed)},
        "num_looks": 3,
    }


def test_the_tally() -> None:
    summary = summarise([outcome(0, problems=[]), outcome(1, problems=["lost"])])
    assert (summary["runs"], summary["failed"], summary["commands"], summary["on_s3"]) == (2, [1], 4, 1)
    assert summary["struck"] == {"driver:TERM": 2, "write.before-put:kill": 2}
    assert summarise([])["runs"] == 0


@pytest.mark.cluster
def test_runs_that_are_in_the_file_are_left_out(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(outcome(0, problems=[])) + "\n")
    command = [sys.executable, "-m", "benchmarks.crash", "--no-s3", "--results", str(results)]
    for count in ("2", "1"):  # the second time nothing is left
        done = subprocess.run(
            [*command, "--runs", count], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["runs"] == int(count) - 1
    assert [json.loads(line)["seed"] for line in results.read_text().splitlines()] == [0, 1]
