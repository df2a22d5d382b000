import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import fingerprint
from pipeline.errors import ConfigError, Superseded, SystemFailure
from pipeline.storage import Storage
from pipeline.versions import COLUMNS, Version, check_in_force, check_settings, read_versions, record_version
from pipeline.write import PartSummary

A: dict[str, Any] = {"checkpoint.dtype": "float32", "seed": None, COLUMNS: ["tokens"]}
B = A | {"checkpoint.dtype": "bfloat16"}
C = A | {COLUMNS: []}
PART = PartSummary(
    shard_id="s",
    num_rows=1,
    num_ok=1,
    errors={},
    audio_seconds=1.0,
    version="0.1.0",
    config_fingerprint=fingerprint({"checkpoint.dtype": "float32", "seed": None}),
    columns=("tokens",),
)


def record(settings: dict[str, Any], folder: Path) -> Version:
    uri = str(folder)
    return record_version(settings, read_versions(uri, Storage()), output_uri=uri, storage=Storage())


def test_what_is_recorded_is_read_back_in_order_and_never_rewritten(tmp_path: Path) -> None:
    assert read_versions(str(tmp_path), Storage()) == ()
    recorded = [record(settings, tmp_path) for settings in (A, A, B, B, C, A)]
    assert [version.number for version in recorded] == [0, 0, 1, 1, 2, 3]
    assert [version.settings for version in read_versions(str(tmp_path), Storage())] == [A, B, C, A]


@pytest.mark.parametrize("num_before", [0, 1])
def test_of_two_that_begin_at_once_with_other_settings_one_stops(tmp_path: Path, num_before: int) -> None:
    if num_before:
        record(C, tmp_path)
    before = read_versions(str(tmp_path), Storage())
    barrier, outcomes = threading.Barrier(8), list[object]()

    def begin(settings: dict[str, Any]) -> None:
        barrier.wait()
        try:
            outcomes.append(record_version(settings, before, output_uri=str(tmp_path), storage=Storage()).settings)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=begin, args=[A if number % 2 else B]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [*earlier, winner] = read_versions(str(tmp_path), Storage())
    assert len(earlier) == num_before
    assert [outcome for outcome in outcomes if not isinstance(outcome, str)] == [winner.settings] * 4
    said = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(said) == 4
    assert all("another run has just begun" in text and "checkpoint.dtype" in text for text in said)


def test_other_settings_are_refused_key_by_key_and_the_way_out_is_named(tmp_path: Path) -> None:
    record(A, tmp_path)
    versions = read_versions(str(tmp_path), Storage())
    check_settings(A, versions, output_uri="/out")
    check_settings(B, (), output_uri="/out")
    with pytest.raises(ConfigError) as caught:
        check_settings(B | {"new": 1}, versions, output_uri="/out")
    said = str(caught.value)
    assert "checkpoint.dtype: 'float32' there, 'bfloat16' now" in said
    assert "new: None there, 1 now" in said
    assert "seed" not in said
    assert "--new-version" in said


def test_a_run_that_was_overtaken_hears_of_it(tmp_path: Path) -> None:
    ours = record(A, tmp_path)
    check_in_force(ours, str(tmp_path), Storage())
    theirs = record(B, tmp_path)
    with pytest.raises(Superseded, match="another run has put newer settings in force"):
        check_in_force(ours, str(tmp_path), Storage())
    check_in_force(theirs, str(tmp_path), Storage())


def test_a_part_is_of_a_version_by_its_fingerprint_and_its_columns() -> None:
    assert Version(number=0, settings=A).made(PART)
    assert not Version(number=0, settings=B).made(PART)
    assert not Version(number=0, settings=C).made(PART)
    assert Version(number=0, settings=C).made(dataclasses.replace(PART, columns=()))


def test_the_record_of_the_first_releases_is_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "_kikitori").mkdir()
    (tmp_path / "_kikitori" / "settings.json").write_text(json.dumps({"settings": A}))
    assert record(A, tmp_path).number == 0
    assert record(B, tmp_path).number == 1
    assert [version.settings for version in read_versions(str(tmp_path), Storage())] == [A, B]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"settings": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    record(A, tmp_path)
    (tmp_path / "_kikitori" / "settings" / "settings-00000.json").write_text(text)
    with pytest.raises(SystemFailure, match=r"settings-00000\.json is damaged"):
        read_versions(str(tmp_path), Storage())
