import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from actors.lane import LaneSettings
from actors.loader import Journey, LoadActor, Stalled
from pipeline.config import load_config
from pipeline.fetch import fetch
from pipeline.load import Padding
from pipeline.messages import Failure, Source, Waveform
from tests.actors.test_lane import SOURCES, pieces

PADDING = Padding(prefix_seconds=0.0, delay_seconds=0.5, sampling_rate_hz=24_000, samples_per_frame=1920)


@given(lengths=st.lists(st.integers(1, 4), min_size=4, max_size=4), deaths=st.lists(st.integers(0, 12), max_size=4))
def test_whenever_loaders_die_every_piece_arrives_once_and_in_order(lengths: list[int], deaths: list[int]) -> None:
    journey = Journey(SOURCES)
    everything = {source.id: pieces(source, length) for source, length in zip(SOURCES, lengths, strict=True)}
    arrived: list[Waveform | Failure] = []
    for death in [*deaths, 1000]:
        sent = [piece for source in journey.todo for piece in everything[source]]
        for piece in sent[:death]:
            arrived += journey.arrived(piece)
        if death < 1000:
            arrived += journey.blame(RuntimeError("gone"))
    crashed = {message.source.id for message in arrived if isinstance(message, Failure)}
    expected = [(source.id, len(piece.samples)) for source in SOURCES for piece in everything[source.id]]
    got = [(m.source.id, len(m.samples)) for m in arrived if isinstance(m, Waveform)]
    assert [entry for entry in got if entry[0] not in crashed] == [e for e in expected if e[0] not in crashed]
    assert len(got) == len(set(got))
    assert not journey.todo


def test_an_input_that_kills_its_loader_three_times_alone_gets_a_row_and_the_rest_go_on() -> None:
    journey = Journey(SOURCES)
    arrived: list[Waveform | Failure] = []
    rounds = 0
    while journey.todo:
        rounds += 1
        for key in list(journey.todo):
            if key == "id1":
                arrived += journey.blame(RuntimeError("segfault"))
                break
            arrived += [m for piece in pieces(journey.todo[key], 1) for m in journey.arrived(piece)]
    failures = [message for message in arrived if isinstance(message, Failure)]
    assert [(f.source.id, f.code, f.stage) for f in failures] == [("id1", "WORKER_CRASHED", "load")]
    assert {message.source.id for message in arrived} == {source.id for source in SOURCES}
    assert rounds == 5  # one death in company, three alone, then the rest


def test_an_input_over_which_loaders_stand_still_gets_a_row_after_the_second_time() -> None:
    journey = Journey(SOURCES)
    assert list(journey.blame(Stalled("nothing for 600 s"))) == []  # any of them may be the one
    (failure,) = journey.blame(Stalled("nothing for 600 s"))
    assert (failure.source, failure.code, failure.message) == (SOURCES[0], "DECODE_TIMEOUT", "nothing for 600 s")
    assert SOURCES[0].id not in journey.todo
    assert len(journey.todo) == len(SOURCES) - 1


def test_a_large_file_may_take_longer_to_fetch() -> None:
    large = Source(id="l", uri="s3://bucket/a.wav", size_bytes=16_000_000_000)
    assert Journey(SOURCES).patience_seconds(600) == 600
    assert Journey([*SOURCES, large]).patience_seconds(600) == 600 + 16_000


def test_what_decoding_takes_is_limited_and_the_process_lives() -> None:
    code = """
import numpy as np
from actors.loader import limit_memory
before = np.ones(300 * 2**20, np.uint8)  # what it has already does not count
limit_memory(0.5)
within = np.ones(256 * 2**20, np.uint8)
try:
    np.ones(512 * 2**20, np.uint8)
except MemoryError:
    print("refused", len(before) + len(within))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == f"refused {556 * 2**20}", done.stderr


def test_a_loader_keeps_every_input_in_its_own_objects_when_asked_to() -> None:
    config = load_config(None, ["checkpoint.source=demo"])
    settings = LaneSettings(
        config=config,
        run_id="test",
        model_revision=fetch(config.checkpoint).revision,
        padding=PADDING,
        num_loaders=1,
        loader_cpus=1,
        num_threads=1,
    )
    loader = LoadActor(settings)
    missing = [Source(id=f"m{index}", uri=f"/nowhere/{index}.wav") for index in range(3)]
    assert [len(group) for group in loader.load(missing, alone=False)] == [3]
    alone = list(loader.load(missing, alone=True))
    assert [len(group) for group in alone] == [1, 1, 1]
    assert all(isinstance(group[0], Failure) and group[0].code == "NOT_FOUND" for group in alone)
