import queue
from pathlib import Path

import pytest

from actors.host import GenerateHost, Result
from models.checkpoint import Checkpoint
from models.decoder import Decoder
from pipeline.align import AlignStage
from pipeline.errors import ModelFailure
from pipeline.generate import GenerateStage
from pipeline.messages import Codes, Failure
from tests.streams import code_pieces, failure, generate

CLIPS = {"a": 30, "b": 7, "c": 19, "d": 1, "e": 24}


@pytest.fixture(scope="module")
def codes(tiny_decoder: Decoder) -> dict[str, list[Codes]]:
    import numpy as np

    rng = np.random.default_rng(5)
    shape = tiny_decoder.config.num_codebooks, tiny_decoder.config.audio_card
    return {
        name: code_pieces(name, rng.integers(0, shape[1], (shape[0], frames)).astype(np.int16), [5, 11])
        for name, frames in CLIPS.items()
    }


def stages(checkpoint: Checkpoint, decoder: Decoder) -> tuple[GenerateStage, AlignStage]:
    generating = GenerateStage(decoder, checkpoint.speech, num_slots=2)
    return generating, AlignStage(checkpoint.load_tokenizer(), checkpoint.speech, frame_rate_hz=12.5)


def test_the_thread_gives_what_the_plain_stage_gives(
    tiny_checkpoint: Checkpoint, tiny_decoder: Decoder, codes: dict[str, list[Codes]]
) -> None:
    plain = GenerateStage(tiny_decoder, tiny_checkpoint.speech, num_slots=2)
    expected = generate(plain, [piece for pieces in codes.values() for piece in pieces])

    results: queue.SimpleQueue[Result] = queue.SimpleQueue()
    host = GenerateHost(*stages(tiny_checkpoint, tiny_decoder), on_death=pytest.fail)
    for name, pieces in codes.items():
        host.expect(pieces[0].source.id, results.put)
        host.put(pieces)
        del name
    got = {result.source.id: result for result in (results.get(timeout=30) for _ in codes)}
    host.stop()

    assert got.keys() == expected.keys()
    for key, result in got.items():
        assert not isinstance(result, Failure)
        assert result.ids.tolist() == expected[key].ids.tolist()


def test_a_failure_is_delivered_once_and_the_others_finish(
    tiny_checkpoint: Checkpoint, tiny_decoder: Decoder, codes: dict[str, list[Codes]]
) -> None:
    results: queue.SimpleQueue[Result] = queue.SimpleQueue()
    host = GenerateHost(*stages(tiny_checkpoint, tiny_decoder), on_death=pytest.fail)
    broken, healthy = codes["a"], codes["b"]
    for pieces in (broken, healthy):
        host.expect(pieces[0].source.id, results.put)
    host.put([broken[0], failure(broken[0].source.uri.rsplit("/", 1)[-1]), *healthy])
    got = [results.get(timeout=30), results.get(timeout=30)]
    host.stop()
    assert sorted(isinstance(result, Failure) for result in got) == [False, True]
    assert results.empty()


def test_the_death_of_the_engine_is_reported_and_nothing_more_is_taken(
    tiny_checkpoint: Checkpoint, tiny_decoder: Decoder, codes: dict[str, list[Codes]]
) -> None:
    generating, aligning = stages(tiny_checkpoint, tiny_decoder)
    deaths: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    host = GenerateHost(generating, aligning, on_death=deaths.put)
    piece = codes["a"][0]
    wrong = Codes(source=piece.source, codes=piece.codes[:3], is_last=True)  # three codebooks instead of eight
    host.expect(piece.source.id, lambda _: pytest.fail("there can be no result"))
    host.put([wrong])
    assert "must match" in str(deaths.get(timeout=30))
    host.stop()
    with pytest.raises(ModelFailure, match="must match"):
        host.put([piece])


def test_occupancy_counts_the_slots_that_moved(
    tiny_checkpoint: Checkpoint, tiny_decoder: Decoder, codes: dict[str, list[Codes]], tmp_path: Path
) -> None:
    del tmp_path
    results: queue.SimpleQueue[Result] = queue.SimpleQueue()
    host = GenerateHost(*stages(tiny_checkpoint, tiny_decoder), on_death=pytest.fail)
    assert host.occupancy == 0
    host.expect(codes["a"][0].source.id, results.put)
    host.put(codes["a"])
    results.get(timeout=30)
    host.stop()
    assert host.occupancy == 0.5  # one stream in two slots
    assert host.num_seated == 0
