"""Reports say what was measured, whatever the clock said."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import BenchOptions, Stopwatch, bench
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError
from tests.make_audio import sine, wav

DIGITS = Path(__file__).parent.parent / "data" / "speech" / "digits"


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["checkpoint.source=demo", "checkpoint.device=cpu", *overrides])


def options(**changes: Any) -> BenchOptions:
    values: dict[str, Any] = {
        "num_slots": (2,),
        "lookaheads": (1, 2),
        "mix": "librispeech",
        "num_clips": 3,
        "longest_seconds": 2.0,
        "shape": "tiny",
        "repeats": 2,
    }
    return BenchOptions(**values | changes)


def test_random_weights_of_a_shape() -> None:
    steps: list[str] = []
    report = bench(config(), options(), on_step=steps.append)
    facts = json.loads(json.dumps(report.as_json()))
    assert facts["model"] == "random weights of shape tiny"
    assert facts["parameters"] == 142_208
    assert [(row["slots"], row["lookahead"]) for row in facts["engine"]] == [(2, 1), (2, 2)]
    assert set(facts["pipeline"]["stage_seconds"]) == {"load", "encode", "generate"}
    assert facts["workload"]["credited_seconds"] == facts["pipeline"]["credited_seconds"]
    assert len(facts["pipeline"]["wall_seconds"]) == len(facts["pipeline"]["bare_engine_wall_seconds"]) == 2
    assert len(set(steps)) == len(steps) - 2, "the engine is announced in each of two repeats"


def test_the_inputs_of_a_config() -> None:
    report = bench(config(f"input.uris=[{DIGITS}]"), options(shape=None, mix=None))
    facts = report.as_json()
    assert facts["workload"]["name"] == "inputs"
    assert facts["workload"]["clips"] == 3
    assert set(facts["pipeline"]["stage_seconds"]) == {"load", "encode", "generate", "align"}
    assert sum(facts["pipeline"]["stage_seconds"].values()) <= max(facts["pipeline"]["wall_seconds"])


def test_what_cannot_be_read_is_not_credited(tmp_path: Path) -> None:
    (tmp_path / "good.wav").write_bytes(wav(sine(seconds=1.0)))
    (tmp_path / "bad.wav").write_bytes(b"no audio at all")
    report = bench(config(f"input.uris=[{tmp_path}]"), options(shape=None, mix=None))
    assert report.clips.credited_seconds == pytest.approx(1.0, abs=0.01)
    assert len(report.clips.codes) == 1


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"shape": "7b"}, [], "known are 2.6b, 1b, 60m, tiny"),
        ({"mix": "podcasts"}, [], "known are 2.5s, librispeech, 30s, 1h"),
        ({"mix": None}, [], "random weights hear nothing"),
        ({"shape": None, "mix": None}, [], "input.uris is empty"),
        ({}, ["stages.generate.temperature=0.5"], "greedy"),
    ],
)
def test_what_cannot_be_measured(changes: dict[str, Any], settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(config(*settings), options(**changes))


def test_a_stopwatch_passes_everything_on() -> None:
    watch = Stopwatch(iter("abc"))
    assert list(watch) == ["a", "b", "c"]
    assert watch.seconds > 0
