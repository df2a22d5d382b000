"""The encoder behind Ray gives what the plain stages give, also when its loader is killed on the way."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from actors.encoder import EncoderActor
from actors.lane import LaneSettings, open_stages
from actors.loader import LoadActor
from pipeline.config import load_config
from pipeline.fetch import fetch
from pipeline.load import Padding
from pipeline.messages import Codes, Failure, Source, Waveform
from tests.make_audio import sine, wav
from tests.processes import kill_one

PADDING = Padding(prefix_seconds=0.0, delay_seconds=0.5, sampling_rate_hz=24_000, samples_per_frame=1920)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def settings() -> LaneSettings:
    config = load_config(None, ["checkpoint.source=demo", "checkpoint.device=cpu"])
    revision = fetch(config.checkpoint).revision
    return LaneSettings(
        config=config,
        run_id="t",
        model_revision=revision,
        padding=PADDING,
        num_loaders=1,
        loader_cpus=0.5,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("tones")
    for index in range(6):
        (folder / f"{index}.wav").write_bytes(wav(sine(20.0 + index, tone_hz=200.0 + 50 * index)))
    (folder / "6.wav").write_bytes(b"no audio at all")
    return [Source(id=f"s{index}", uri=str(path)) for index, path in enumerate(sorted(folder.iterdir()))]


def joined(messages: list[Codes | Failure]) -> dict[str, Any]:
    """Codes of every stream, or the code of its failure; each stream must have ended once."""
    pieces: dict[str, list[Codes]] = {}
    found: dict[str, Any] = {}
    for message in messages:
        if isinstance(message, Failure):
            assert message.source.id not in found
            found[message.source.id] = message.code
        else:
            pieces.setdefault(message.source.id, []).append(message)
    for key, stream in pieces.items():
        assert [piece.is_last for piece in stream] == [False] * (len(stream) - 1) + [True]
        found[key] = np.concatenate([piece.codes for piece in stream], axis=1).tolist()
    return found


@pytest.fixture(scope="module")
def expected(settings: LaneSettings, sources: list[Source]) -> dict[str, Any]:
    stages = open_stages(settings)
    return joined(list(stages.encode().run(stages.load().run(sources))))


class HangingLoader(LoadActor):
    """One of its inputs sends it into a loop that does not end."""

    def load(self, sources: Sequence[Source], alone: bool) -> Iterator[list[Waveform | Failure]]:
        for source in sources:
            while source.id == "s2":
                time.sleep(0.1)
            yield from super().load([source], alone)


class PatientEncoder(EncoderActor):
    _loader_class = HangingLoader


def test_an_input_whose_decoder_hangs_gets_a_row_and_the_others_their_codes(
    settings: LaneSettings, sources: list[Source], expected: dict[str, Any]
) -> None:
    overrides = ["checkpoint.source=demo", "checkpoint.device=cpu", "stages.load.stall_seconds=4"]
    actor: Any = ray.remote(PatientEncoder)
    hasty = replace(settings, config=load_config(None, overrides))
    encoder = actor.options(num_cpus=0, max_concurrency=8).remote(hasty)
    assert ray.get(encoder.ready.remote())
    objects = encoder.encode.options(num_returns="streaming").remote(sources)
    messages: list[Codes | Failure] = [message for reference in objects for message in ray.get(reference)]
    ray.kill(encoder)
    assert joined(messages) == {**expected, "s2": "DECODE_TIMEOUT"}
    (told,) = [m.message for m in messages if isinstance(m, Failure) and m.code == "DECODE_TIMEOUT"]
    assert "gave nothing for 4 s" in told
    assert "stages.load.stall_seconds" in told


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("rows", ["1", "3"])
def test_codes_through_actors_are_the_plain_codes(
    settings: LaneSettings, sources: list[Source], expected: dict[str, Any], kill: bool, rows: str
) -> None:
    overrides = ["checkpoint.source=demo", "checkpoint.device=cpu", f"stages.encode.rows={rows}"]
    settings = replace(settings, config=load_config(None, overrides))
    actor: Any = ray.remote(EncoderActor)
    encoder = actor.options(num_cpus=0, max_concurrency=8).remote(settings)
    assert ray.get(encoder.ready.remote())
    messages: list[Codes | Failure] = []
    objects = encoder.encode.options(num_returns="streaming", _generator_backpressure_num_objects=1).remote(sources)
    for index, reference in enumerate(objects):
        messages += ray.get(reference)
        if kill and index == 0:
            kill_one("LoadActor")
    ray.kill(encoder)
    assert joined(messages) == expected
    assert expected["s6"] == "UNSUPPORTED_FORMAT"
