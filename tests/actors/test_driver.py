"""The distributed job against the one-process reference, with processes killed for real."""

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from actors import driver
from actors.decoder import DecoderActor
from actors.job import JobResult, RunOptions, run_job
from pipeline.config import RunConfig, load_config
from pipeline.discover import discover
from pipeline.errors import ConfigError, Superseded, SystemFailure
from pipeline.fetch import fetch
from pipeline.messages import Codes, Source, Transcript
from pipeline.run import build_stages, transcribe
from pipeline.storage import Storage
from pipeline.versions import read_versions, record_version
from tests.make_audio import encoded, sine, wav
from tests.processes import actors, kill_one
from tests.speech import clips

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]

QUIET = Console(stderr=True, quiet=True)
# What must not depend on where, when and beside whom an input was transcribed.
COLUMNS = ["id", "source_uri", "content_sha256", "status", "error_code", "duration_s", "text", "words", "tokens"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 inputs: real and synthetic speech in several containers, and five that are broken."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, samples in enumerate(clips(195)):
        container, codec = [("wav", "pcm_s16le"), ("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame")][
            index % 4
        ]
        data = encoded(samples, container=container, codec=codec, rate_hz=24_000)
        (folder / f"clip{index:03d}.{container}").write_bytes(data)
    flac = encoded(sine(4.0), container="flac", codec="flac")
    broken = {
        "empty.wav": b"",
        "text.wav": b"this is not audio, it only says so\n",
        "one-sample.wav": wav(sine(4.0)[:1]),
        "half.flac": flac[: len(flac) // 2],
        "header-only.wav": wav(sine(1.0))[:44],
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, tuple[str, ...]]:
    """The one-process reference: source uri -> status and tokens."""
    config = configured(corpus, corpus)
    sources = [found.source for found in discover([str(corpus)], Storage()).found]
    stages = build_stages(config, fetch(config.checkpoint))
    return {
        result.source.uri: ("ok", result.text, *map(str, result.ids))
        if isinstance(result, Transcript)
        else (result.code,)
        for result in transcribe(sources, stages)
    }


def configured(corpus: Path, output: Path, *overrides: str) -> RunConfig:
    return load_config(
        None,
        [
            "checkpoint.source=demo",
            "checkpoint.device=cpu",
            f"input.uris=[{corpus}]",
            f"output.uri={output}",
            "output.columns=[tokens]",
            "input.shard_audio_hours=0.02",
            *overrides,
        ],
    )


def run(corpus: Path, output: Path, *overrides: str) -> JobResult:
    return run_job(configured(corpus, output, *overrides), QUIET)


def rows(output: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(output / "data").select(COLUMNS).to_pylist(), key=lambda row: row["source_uri"])


def outcome(row: dict[str, Any]) -> tuple[str, ...]:
    return ("ok", row["text"], *map(str, row["tokens"])) if row["status"] == "ok" else (row["error_code"],)


@pytest.fixture(scope="module")
def undisturbed(cluster: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    result = run(corpus, output)
    assert result.exit_code == 1
    assert result.num_lost_lanes == 0
    return output


def test_rows_out_are_inputs_in_and_equal_the_one_process_reference(
    undisturbed: Path, expected: dict[str, tuple[str, ...]]
) -> None:
    found = rows(undisturbed)
    assert len(found) == 200
    assert {row["source_uri"]: outcome(row) for row in found} == expected
    errors = {Path(row["source_uri"]).name: row["error_code"] for row in found if row["status"] == "error"}
    assert errors.keys() == {"empty.wav", "text.wav", "one-sample.wav", "half.flac", "header-only.wav"}


def test_nothing_is_left_behind(undisturbed: Path) -> None:
    assert undisturbed.exists()
    deadline = time.monotonic() + 20
    while any(actors(name) for name in ("DecoderActor", "EncoderActor", "LoadActor")):
        assert time.monotonic() < deadline, "actors of a finished run are still alive"
        time.sleep(0.2)


def test_running_again_does_nothing_and_says_the_same(corpus: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "data").iterdir()}
    result = run(corpus, undisturbed)
    assert (result.exit_code, result.num_shards_done) == (1, 0)
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "data").iterdir()} == before


@pytest.mark.parametrize("victim", ["DecoderActor", "EncoderActor", "LoadActor"])
def test_killing_an_actor_half_way_changes_nothing_in_the_rows(
    victim: str, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    killed: list[int] = []

    def assassin() -> None:
        wait_for(lambda: len(list((output / "data").glob("part-*"))) >= 3)
        killed.append(kill_one(victim))

    thread = threading.Thread(target=assassin, daemon=True)
    thread.start()
    result = run(corpus, output)
    thread.join(timeout=10)
    assert killed
    assert result.num_lost_lanes == (0 if victim == "LoadActor" else 1)
    assert rows(output) == rows(undisturbed)


class PoisonedDecoder(DecoderActor):
    """Its process dies for real whenever one of the marked inputs reaches the decoder."""

    async def _transcribe(self, work: Any, sources: Sequence[Source]) -> None:
        if any("poison" in source.uri for source in sources):
            await asyncio.sleep(0.05)  # the others are under way
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._transcribe(work, sources)


class ChokingDecoder(DecoderActor):
    """Its engine raises, as torch does, when one of the marked inputs reaches it."""

    async def _transcribe(self, work: Any, sources: Sequence[Source]) -> None:
        if any("poison" in source.uri for source in sources):
            codes = np.zeros((3, 5), np.int16)  # three codebooks, where the model has eight
            self._host.put([Codes(source=source, codes=codes, is_last=False) for source in sources])
        await super()._transcribe(work, sources)


@pytest.mark.parametrize(("decoder", "code"), [(PoisonedDecoder, "WORKER_CRASHED"), (ChokingDecoder, "MODEL_ERROR")])
def test_inputs_that_kill_their_decoder_get_a_row_and_the_others_their_transcripts(
    decoder: type[DecoderActor],
    code: str,
    corpus: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(driver, "DecoderActor", decoder)
    inputs, output = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    names = ["clip004.wav", "clip005.flac", "clip007.mp3", "clip008.wav"]
    for name in names:
        shutil.copy2(corpus / name, inputs / name)
    for name in ("poison-a.wav", "poison-b.wav"):
        shutil.copy2(corpus / "clip000.wav", inputs / name)
    result = run(inputs, output)
    assert result.status.errors == {code: 2}
    found = {Path(row["source_uri"]).name: row for row in rows(output)}
    assert {name for name, row in found.items() if row["error_code"] == code} == {"poison-a.wav", "poison-b.wav"}
    reference = {Path(row["source_uri"]).name: row["tokens"] for row in rows(undisturbed)}
    assert {name: found[name]["tokens"] for name in names} == {name: reference[name] for name in names}


def poisoned(corpus: Path, folder: Path) -> Path:
    """Four inputs that are well and one that kills."""
    folder.mkdir()
    for name in ("clip004.wav", "clip005.flac", "clip007.mp3", "clip008.wav"):
        shutil.copy2(corpus / name, folder / name)
    shutil.copy2(corpus / "clip000.wav", folder / "poison.wav")
    return folder


def test_lanes_that_an_earlier_run_has_lost_need_not_be_lost_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(driver, "DecoderActor", PoisonedDecoder)
    inputs, output = poisoned(corpus, tmp_path / "in"), tmp_path / "out"
    with monkeypatch.context() as patch:  # a driver that goes away after two deaths
        patch.setattr(driver, "_MAX_FRUITLESS", 2)
        with pytest.raises(SystemFailure, match=r"lost its lane 2 times.*0 of 1 shards are committed"):
            run(inputs, output)
    [record] = (output / "_kikitori" / "journal").iterdir()
    assert json.loads(record.read_text())["deaths"] == 2
    result = run(inputs, output)
    assert (result.num_lost_lanes, result.status.errors) == (1, {"WORKER_CRASHED": 1})

    # Convicted: where the shard has to be done again, that input is not touched.
    [part] = (output / "data").iterdir()
    part.unlink()
    result = run(inputs, output)
    assert (result.num_lost_lanes, result.status.errors) == (0, {"WORKER_CRASHED": 1})

    # Acquitted: it is touched once more, and what has been cured gets its transcript.
    retry = RunOptions(retry_codes=frozenset({"WORKER_CRASHED"}))
    result = run_job(configured(inputs, output), QUIET, retry)
    assert (result.num_lost_lanes, result.status.errors) == (1, {"WORKER_CRASHED": 1})
    monkeypatch.setattr(driver, "DecoderActor", DecoderActor)
    result = run_job(configured(inputs, output), QUIET, retry)
    assert (result.num_lost_lanes, result.status.errors, result.status.num_ok) == (0, {}, 5)
    assert not list((output / "_kikitori" / "journal").iterdir())


class OvertakenDecoder(DecoderActor):
    """While it works, another run puts other settings in force."""

    async def _transcribe(self, work: Any, sources: Sequence[Source]) -> None:
        await super()._transcribe(work, sources)
        uri, storage = self._output_uri, Storage()
        versions = read_versions(uri, storage)
        if len(versions) == 1:
            record_version({"other": "settings"}, versions, output_uri=uri, storage=storage)


def test_a_run_that_is_overtaken_by_new_settings_stops_before_it_writes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(driver, "DecoderActor", OvertakenDecoder)
    with pytest.raises(Superseded, match=r"another run has put newer settings in force.*0 of 1 shards"):
        run(poisoned(corpus, tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "data").exists()


def test_when_all_lanes_are_lost_and_no_place_comes_back_the_run_ends_and_says_what_there_is(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_NO_CAPACITY_SECONDS", 3.0)
    output, groups = tmp_path / "out", list[Any]()

    def take_the_machine() -> None:
        """Ask for all of it, and kill the lane: its place goes to whoever asked first."""
        wait_for(lambda: len(list((output / "data").glob("part-*"))) >= 2)
        groups.append(placement_group([{"CPU": 2}]))
        kill_one("DecoderActor")

    thread = threading.Thread(target=take_the_machine, daemon=True)
    thread.start()
    try:
        with pytest.raises(SystemFailure, match=r"all lanes are lost, and there was no node .* [1-9]\d* of \d+ shards"):
            run(corpus, output)
    finally:
        thread.join(timeout=10)
        remove_placement_group(groups[0])


def test_one_lane_or_two_small_shards_or_one_large_one_the_rows_are_the_same(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run(corpus, tmp_path / "out", "input.shard_audio_hours=10", "stages.generate.slots=8", "ray.lanes=2")
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_a_stopped_run_keeps_what_is_committed_and_the_next_one_finishes(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def interrupt() -> None:
        wait_for(lambda: len(list((output / "data").glob("part-*"))) >= 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    begun = time.monotonic()
    stopped = run(corpus, output)
    thread.join(timeout=10)
    assert stopped.exit_code == 143
    assert time.monotonic() - begun < 60
    assert not stopped.status.is_complete
    finished = run(corpus, output)
    assert finished.exit_code == 1
    assert rows(output) == rows(undisturbed)


def test_a_checkpoint_that_the_lanes_cannot_open_ends_the_run_and_says_why(corpus: Path, tmp_path: Path) -> None:
    import models

    folder = tmp_path / "checkpoint"
    shutil.copytree(Path(models.__file__).parent / "demo" / "original", folder)

    def vanish() -> None:
        wait_for(lambda: bool(list((tmp_path / "out").glob("_kikitori/settings/*.json"))))
        (folder / "mimi.safetensors").unlink()

    thread = threading.Thread(target=vanish, daemon=True)
    thread.start()
    with pytest.raises(SystemFailure, match="no lane came up"):
        run(corpus, tmp_path / "out", f"checkpoint.source={folder}")
    thread.join(timeout=10)


def test_an_output_made_with_other_settings_is_refused_and_the_difference_named(
    corpus: Path, undisturbed: Path
) -> None:
    with pytest.raises(ConfigError, match=r"stages\.generate\.alignment: 'all-frames' there"):
        run(corpus, undisturbed, "stages.generate.alignment=bos-replaces-first")


def test_other_columns_would_make_parts_that_do_not_fit_together(corpus: Path, undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.columns: \['tokens'\] there, \[\] now"):
        run(corpus, undisturbed, "output.columns=[]")


def wait_for(condition: Callable[[], bool], *, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come to that")
        time.sleep(0.02)
