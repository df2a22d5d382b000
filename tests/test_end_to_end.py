"""The command as a user types it, in a folder of the user's, with a Ray of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.storage import Storage
from pipeline.versions import record_version
from tests.make_audio import sine, wav
from tests.processes import descendants
from tests.speech import ROOT

KIKITORI = (str(Path(sys.executable).with_name("kikitori")),)

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


def start(folder: Path, *arguments: str, command: Sequence[str] = KIKITORI) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


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


def test_the_demo_takes_over_what_an_earlier_one_has_left(tmp_path: Path) -> None:
    before = {"checkpoint.source": "demo", "checkpoint.commit": "of an earlier version"}
    record_version(before, [], output_uri=str(tmp_path / "demo-output"), storage=Storage())
    parts: list[dict[str, int]] = []
    for _ in range(2):
        process = start(tmp_path, command=(sys.executable, "-m", "deploy.demo"))
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert "31 rows, 0 errors" in out
        parts.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "demo-output" / "data").iterdir()})
    assert parts[0] == parts[1], "nothing was left to do"


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


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "out" / "data").sort_by("id").to_pylist()


def wait_for(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


SMALL_SHARDS = ("-s", "input.shard_audio_hours=0.001")


def test_two_runs_at_once_make_every_row_once(folder: Path) -> None:
    both = [start(folder, "run", "job.yaml", "--json", *SMALL_SHARDS) for _ in range(2)]
    said = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    results = [json.loads(out) for out, _ in said]
    assert [result["rows"] for result in results] == [5, 5]
    assert sum(result["shards_done"] for result in results) == results[0]["shards"] > 1
    assert len({row["id"] for row in rows_of(folder)}) == len(rows_of(folder)) == 5


def test_of_two_first_runs_with_other_settings_one_stops_and_the_other_finishes(folder: Path) -> None:
    alignments = ("all-frames", "bos-replaces-first")
    both = [start(folder, "run", "job.yaml", "-s", f"stages.generate.alignment={one}") for one in alignments]
    said = [process.communicate(timeout=180)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [1, 2], said
    refused = said[codes.index(2)]
    assert "other settings" in refused
    assert "stages.generate.alignment" in refused
    rows = rows_of(folder)
    assert len(rows) == 5
    assert len({row["config_fingerprint"] for row in rows}) == 1


def test_after_sigterm_it_is_gone_within_30_seconds_and_what_is_committed_is_whole(folder: Path) -> None:
    hour = np.tile(sine(60.0, rate_hz=8000), 60 * 3)
    (folder / "my audio" / "endless.wav").write_bytes(wav(hour, rate_hz=8000))
    # Two loaders: one has its hands full.
    slow = ("-s", "stages.generate.lookahead=1", "-s", "stages.load={cpus: 0.5, actors: 2}")
    process = start(folder, "run", "job.yaml", "--json", *SMALL_SHARDS, *slow)
    wait_for(lambda: any((folder / "out" / "data").glob("part-*")))
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    seconds = time.monotonic() - begun
    assert process.returncode == 143, err
    assert 15 < seconds < 30, "with a shard open it waits a while, and not too long"
    result = json.loads(out)
    assert result["remaining_shards"] == 1
    assert len(rows_of(folder)) == result["rows"] == 5


def test_a_lost_machine_that_does_not_come_back_leaves_the_work_to_the_others(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    few = [shutil.copy(clip, folder / "my audio") for clip in sorted((ROOT / "digits").glob("test_unseen_*.wav"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        address = ("-s", f"ray.address={cluster.address}")
        process = start(folder, "run", "job.yaml", "--json", "-s", "input.shard_audio_hours=0.0005", *address)
        wait_for(lambda: any((folder / "out" / "data").glob("part-*")))
        cluster.remove_node(machines[0], allow_graceful=False)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 1, err
        assert json.loads(out)["rows"] == 5 + len(few)
    finally:
        cluster.shutdown()
