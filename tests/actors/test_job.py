import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.job import JobResult, RunOptions, retry_codes, run_job
from pipeline.config import RunConfig, load_config
from pipeline.errors import ERROR_CODES, CheckpointError, ConfigError, SystemFailure
from pipeline.plan import make_plan
from pipeline.status import Status
from pipeline.storage import Storage
from tests.speech import ROOT

QUIET = Console(stderr=True, quiet=True)
STATUS = Status(
    num_inputs=3,
    num_shards=1,
    num_committed_shards=1,
    num_outdated_shards=0,
    num_rows=3,
    num_ok=3,
    errors={},
    audio_seconds=7200,
    remaining_seconds=0,
    versions=(),
)
RESULT = JobResult(
    run_id="r",
    output_uri="/out",
    status=STATUS,
    num_shards_done=1,
    audio_seconds=7200,
    wall_seconds=60,
    num_lost_lanes=0,
    ignored={},
)


def configured(tmp_path: Path, *overrides: str) -> RunConfig:
    inputs = tmp_path / "in"
    inputs.mkdir(exist_ok=True)
    shutil.copy2(ROOT / "digits" / "test_seen_7.wav", inputs)  # not touched: it stays the same input
    base = ["checkpoint.source=demo", f"input.uris=[{inputs}]", f"output.uri={tmp_path / 'out'}"]
    return load_config(None, [*base, *overrides])


def test_the_exit_code_is_what_the_command_line_promises() -> None:
    assert RESULT.exit_code == 0
    with_errors = dataclasses.replace(STATUS, num_ok=2, errors={"DECODE_FAILED": 1})
    assert dataclasses.replace(RESULT, status=with_errors).exit_code == 1
    assert dataclasses.replace(RESULT, status=with_errors, signal=2).exit_code == 130
    assert dataclasses.replace(RESULT, signal=15).exit_code == 143


def test_rtfx_is_audio_seconds_per_wall_second() -> None:
    assert RESULT.rtfx == 120
    assert dataclasses.replace(RESULT, wall_seconds=0).rtfx == 0


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("output.uri=", ConfigError, r"output\.uri is empty"),
        ("input.uris=[]", ConfigError, "uris"),
        ("checkpoint.source=/no/such/checkpoint", CheckpointError, "/no/such/checkpoint"),
        ("output.columns=[audio]", ConfigError, "audio"),
    ],
)
def test_what_the_user_has_to_correct_is_said_before_ray_starts(
    tmp_path: Path, override: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # any use of it from here on would fail
    with pytest.raises(error, match=message):
        run_job(configured(tmp_path, override), QUIET)
    assert not (tmp_path / "out" / "data").exists()


def test_the_settings_of_an_output_are_recorded_without_secrets(tmp_path: Path) -> None:
    config = configured(tmp_path, "output.storage_options={secret: hunter2}", "output.columns=[audio]")
    with pytest.raises(ConfigError):
        run_job(config, QUIET)
    assert "hunter2" not in config.to_yaml()


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    record = tmp_path / "out" / "_kikitori" / "settings" / "settings-00000.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    with pytest.raises(SystemFailure, match=r"settings-00000\.json is damaged"):
        run_job(configured(tmp_path), QUIET)


def test_a_run_that_is_refused_adds_nothing_to_the_plan(tmp_path: Path) -> None:
    config = configured(tmp_path)
    record = tmp_path / "out" / "_kikitori" / "settings" / "settings-00000.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"settings": {"version": "0.0.1"}}))
    with pytest.raises(ConfigError, match=r"version: '0\.0\.1' there"):
        run_job(config, QUIET)
    assert not (tmp_path / "out" / "_kikitori" / "manifest").exists()


@pytest.mark.parametrize(
    ("text", "codes"),
    [("NOT_FOUND", {"NOT_FOUND"}), ("NOT_FOUND, TRUNCATED", {"NOT_FOUND", "TRUNCATED"}), ("all", set(ERROR_CODES))],
)
def test_error_codes_are_named_or_all_are_meant(text: str, codes: set[str]) -> None:
    assert retry_codes(text) == codes


@pytest.mark.parametrize("text", ["", "not_found", "NOT_FOUND,", "all,NOT_FOUND", "NOPE"])
def test_an_error_code_that_does_not_exist_is_refused_and_the_known_ones_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--retry-errors: found '.*the error codes are NOT_FOUND, FETCH_FAILED"):
        retry_codes(text)


on_ray = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]


def with_marks(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_ray:
        test = mark(test)
    return test


@with_marks
def test_a_finished_output_says_with_what_it_was_made(tmp_path: Path) -> None:
    config = configured(tmp_path)
    before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    result = run_job(config, QUIET)
    assert result.exit_code == 0
    assert signal.signal(signal.SIGTERM, before) is handler, "a SIGTERM that comes late does what it did before"
    record = json.loads((tmp_path / "out/_kikitori/settings/settings-00000.json").read_text())
    assert record["settings"]["checkpoint.source"] == "demo"
    assert load_config(str(tmp_path / "out/_kikitori/config.yaml")) == config


SMALL_SHARDS = ("input.shard_audio_hours=0.001", "stages.generate.slots=4")


def corpus(tmp_path: Path, count: int = 6) -> list[Path]:
    """Clips, of which each is a shard of its own with `SMALL_SHARDS`."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    return [Path(shutil.copy2(clip, inputs)) for clip in sorted((ROOT / "digits").glob("*.wav"))[:count]]


def parts_of(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}


def readers(output: Path) -> Iterator[list[str]]:
    """The ids that each reader finds, by the folder of the parts and by the whole output."""
    for folder in (output / "data", output):
        yield pq.read_table(folder)["id"].to_pylist()
        yield list(pandas.read_parquet(folder)["id"])
        yield [id for (id,) in duckdb.connect().sql(f"select id from read_parquet('{folder}/**/*.parquet')").fetchall()]
        with tempfile.TemporaryDirectory() as cache:
            dataset: Any = datasets.load_dataset(str(folder), cache_dir=cache, split="train")
            yield list(dataset["id"])


@with_marks
def test_new_settings_replace_every_part_under_the_eyes_of_its_readers(tmp_path: Path) -> None:
    corpus(tmp_path)
    data = tmp_path / "out" / "data"
    first = run_job(configured(tmp_path, *SMALL_SHARDS), QUIET)
    before, ids = parts_of(tmp_path), sorted(next(readers(tmp_path / "out")))
    new = configured(tmp_path, *SMALL_SHARDS, "stages.generate.alignment=bos-replaces-first")
    with pytest.raises(ConfigError, match=r"(?s)stages\.generate\.alignment: 'all-frames' there.*--new-version"):
        run_job(new, QUIET)
    (data / ".0123.tmp").write_bytes(b"half a part")
    stop, seen = threading.Event(), list[list[str]]()

    def watch() -> None:
        while not stop.is_set():
            seen.extend(map(sorted, readers(tmp_path / "out")))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    second = run_job(new, QUIET, RunOptions(new_version=True))
    stop.set()
    watcher.join()
    (data / ".0123.tmp").unlink()
    assert len(seen) > 8, "each reader has looked while it went on"
    seen.extend(map(sorted, readers(tmp_path / "out")))
    assert all(found == ids for found in seen)
    assert second.num_shards_done == first.num_shards_done == len(before) > 1
    assert second.status.is_complete
    old_version, new_version = second.status.versions
    assert (old_version.num_parts, new_version.num_parts) == (0, len(before))
    assert set(pq.read_table(data)["config_fingerprint"].to_pylist()) == {new_version.config_fingerprint}
    archive = tmp_path / "out" / "_kikitori" / "archive" / old_version.config_fingerprint
    assert {f"{path.stem}.parquet": path.read_bytes() for path in archive.iterdir()} == before
    assert parts_of(tmp_path).keys() == before.keys()
    assert run_job(new, QUIET).num_shards_done == 0
    with pytest.raises(ConfigError, match="'bos-replaces-first' there"):
        run_job(configured(tmp_path, *SMALL_SHARDS), QUIET)


def plan_and_hide(tmp_path: Path, config: RunConfig, hidden: Sequence[Path]) -> Path:
    """Plan everything, then take some inputs away; -> where they are."""
    make_plan(config, Storage(), Storage())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in hidden:
        path.rename(elsewhere / path.name)
    return elsewhere


@with_marks
@pytest.mark.parametrize("hours", [0.001, 1.0])
def test_retried_inputs_get_new_rows_and_all_others_keep_theirs(tmp_path: Path, hours: float) -> None:
    clips = corpus(tmp_path)
    config = configured(tmp_path, f"input.shard_audio_hours={hours}")
    elsewhere = plan_and_hide(tmp_path, config, clips[1:3])
    assert run_job(config, QUIET).status.errors == {"NOT_FOUND": 2}
    before, old = parts_of(tmp_path), pq.read_table(tmp_path / "out" / "data").sort_by("id")
    assert run_job(config, QUIET, RunOptions(retry_codes=frozenset({"TRUNCATED"}))).num_shards_done == 0
    assert parts_of(tmp_path) == before
    for path in clips[1:3]:
        (elsewhere / path.name).rename(path)
    shutil.copy(clips[0], tmp_path / "in" / "new.wav")
    result = run_job(config, QUIET, RunOptions(retry_codes=frozenset({"NOT_FOUND"})))
    assert (result.exit_code, result.status.num_ok) == (0, 8)
    new = pq.read_table(tmp_path / "out" / "data").sort_by("id")
    again = {str(path) for path in [*clips[1:3], tmp_path / "in" / "new.wav"]}
    rows = {row["source_uri"]: row for row in new.to_pylist()}
    assert {uri for uri, row in rows.items() if row["run_id"] == result.run_id} == again
    untouched = [uri not in again for uri in new["source_uri"].to_pylist()]
    kept = [uri not in again for uri in old["source_uri"].to_pylist()]
    assert new.filter(untouched).equals(old.filter(kept))
    changed = {name for name, data in parts_of(tmp_path).items() if before.get(name) != data}
    assert len(changed) == (3 if hours < 1 else 2)


@with_marks
def test_a_world_that_is_broken_ends_the_run_before_it_is_written_down(tmp_path: Path) -> None:
    clips = corpus(tmp_path)
    config = configured(tmp_path)
    plan_and_hide(tmp_path, config, clips[:4])
    with pytest.raises(SystemFailure) as caught:
        run_job(config, QUIET, RunOptions(max_error_rate=0.5))
    said = str(caught.value)
    for part in ("4 of the 7 inputs", "NOT_FOUND 4", "e.g. /", "Check input.uris", "0 of 1 shards are committed"):
        assert part in said
    assert not (tmp_path / "out" / "data").exists()
    assert run_job(config, QUIET, RunOptions(max_error_rate=0.6)).exit_code == 1
