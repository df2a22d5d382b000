"""The command as a user types it, in a folder of the user's, with a Ray of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.processes import descendants
from tests.speech import ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Relative paths, names with spaces, and a `models` package that is not ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise ImportError('the wrong models')\n")
    (tmp_path / "my audio").mkdir()
    for index in range(4):
        shutil.copy(ROOT / "digits" / f"test_seen_{index}.wav", tmp_path / "my audio")
    (tmp_path / "my audio" / "broken.wav").write_text("not audio")
    (tmp_path / "job.yaml").write_text(
        "checkpoint: {source: demo}\ninput: {uris: [my audio]}\noutput: {uri: out, columns: [tokens]}\n"
    )
    return tmp_path


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).with_name("kikitori")), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def kikitori(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def test_run_then_run_again_then_status_then_transcribe(folder: Path) -> None:
    code, out, err = kikitori(folder, "run", "job.yaml", "--json")
    assert code == 1, err
    result: dict[str, Any] = json.loads(out)
    assert (result["rows"], result["ok"], result["errors"]) == (5, 4, {"UNSUPPORTED_FORMAT": 1})
    rows = pq.read_table(folder / "out" / "data").to_pylist()
    assert len({row["id"] for row in rows}) == 5
    assert all(Path(row["source_uri"]).is_absolute() for row in rows)

    code, out, err = kikitori(folder, "run", "job.yaml", "--json")
    assert (code, json.loads(out)["shards_done"]) == (1, 0), err

    code, out, _ = kikitori(folder, "status", "job.yaml", "--json")
    assert (code, json.loads(out)["complete"]) == (0, True)

    code, out, _ = kikitori(
        folder, "transcribe", "my audio/*.wav", "--model", "demo", "--json", "-s", "output.columns=[tokens]"
    )
    assert code == 1
    alone = {row["id"]: row for row in map(json.loads, out.splitlines())}
    for row in rows:
        assert alone[row["id"]]["tokens"] == row["tokens"]
        assert alone[row["id"]]["error_code"] == row["error_code"]


@pytest.mark.parametrize("seconds", [0.3, 2.0, 7.0])
def test_ctrl_c_leaves_soon_and_leaves_nothing_running(folder: Path, seconds: float) -> None:
    """While Ray starts, and while it works: interrupted half-way, its start left two agents behind for ever."""
    process = start(folder, "run", "job.yaml")
    deadline = time.monotonic() + 60
    while not descendants(process.pid):  # Ray is starting
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(seconds)
    started = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begun < 30
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline, "processes of the run are still alive"
        time.sleep(0.1)
