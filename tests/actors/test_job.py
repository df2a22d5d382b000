import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actors.job import JobResult, run_job
from pipeline.config import RunConfig, load_config
from pipeline.errors import CheckpointError, ConfigError, SystemFailure
from pipeline.status import Status
from tests.speech import ROOT

QUIET = Console(stderr=True, quiet=True)
STATUS = Status(
    num_inputs=3,
    num_shards=1,
    num_committed_shards=1,
    num_rows=3,
    num_ok=3,
    errors={},
    audio_seconds=7200,
    remaining_seconds=0,
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
    shutil.copy(ROOT / "digits" / "test_seen_7.wav", inputs)
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
    record = tmp_path / "out" / "_kikitori" / "settings.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    with pytest.raises(SystemFailure, match=r"settings\.json is damaged"):
        run_job(configured(tmp_path), QUIET)


def test_a_run_that_is_refused_adds_nothing_to_the_plan(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "part-0123456789abcdef.parquet").touch()
    record = tmp_path / "out" / "_kikitori" / "settings.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"settings": {"version": "0.0.1"}}))
    with pytest.raises(ConfigError, match=r"version: '0\.0\.1' there"):
        run_job(config, QUIET)
    assert not (record.parent / "manifest").exists()


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_a_finished_output_says_with_what_it_was_made(tmp_path: Path) -> None:
    config = configured(tmp_path)
    result = run_job(config, QUIET)
    assert result.exit_code == 0
    record = json.loads((tmp_path / "out/_kikitori/settings.json").read_text())
    assert record["settings"]["checkpoint.source"] == "demo"
    assert load_config(str(tmp_path / "out/_kikitori/config.yaml")) == config
