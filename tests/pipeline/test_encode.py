"""A stream's codes are those of its audio, however it was cut, mixed with others or broken off."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.mimi import MimiEncoder
from pipeline.encode import EncodeStage
from pipeline.messages import AudioFacts, Codes, Failure, Waveform
from tests.streams import failure, interleaved, source, waveform_pieces
from tests.tiny import FRAME_SAMPLES, NUM_CODEBOOKS, clip

NUM_FRAMES = 40


def audio(seed: int, num_frames: int = NUM_FRAMES) -> NDArray[np.float32]:
    return clip(seed, num_frames * FRAME_SAMPLES)


def stage(mimi: MimiEncoder, *, piece_frames: int = 7) -> EncodeStage:
    return EncodeStage(mimi, piece_seconds=piece_frames / 12.5)


def one_shot(mimi: MimiEncoder, samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return mimi.encode(torch.from_numpy(samples)[None])[0].numpy().astype(np.int16)


def joined(messages: list[Codes | Failure], name: str) -> NDArray[np.int16]:
    mine = [message for message in messages if message.source.id == name]
    assert all(isinstance(message, Codes) for message in mine)
    assert [message.is_last for message in mine] == [False] * (len(mine) - 1) + [True]
    return np.concatenate([message.codes for message in mine], axis=1)


@given(
    cuts=st.lists(st.integers(0, NUM_FRAMES * FRAME_SAMPLES), max_size=8),
    piece_frames=st.integers(1, NUM_FRAMES + 5),
)
def test_codes_do_not_depend_on_cuts(tiny_mimi: MimiEncoder, cuts: list[int], piece_frames: int) -> None:
    """Of the waveform, at any sample, nor of the pieces that are encoded at once."""
    out = list(stage(tiny_mimi, piece_frames=piece_frames).run(waveform_pieces("a", audio(0), cuts)))
    assert np.array_equal(joined(out, "a"), one_shot(tiny_mimi, audio(0)))


@pytest.mark.parametrize("seed", range(4))
def test_streams_do_not_meet(tiny_mimi: MimiEncoder, seed: int) -> None:
    clips = {name: audio(index, 5 + 11 * index) for index, name in enumerate("abc")}
    pieces = [
        waveform_pieces(name, samples, range(FRAME_SAMPLES * 4, len(samples), FRAME_SAMPLES * 4))
        for name, samples in clips.items()
    ]
    out = list(stage(tiny_mimi).run(interleaved(pieces, seed)))
    for name, samples in clips.items():
        assert np.array_equal(joined(out, name), one_shot(tiny_mimi, samples))


def test_a_failure_ends_its_stream_and_no_other(tiny_mimi: MimiEncoder) -> None:
    broken, whole = waveform_pieces("a", audio(0), [19200]), waveform_pieces("b", audio(1), [19200])
    encode = stage(tiny_mimi)
    out = list(encode.run([broken[0], whole[0], failure("a"), whole[1]]))
    assert [message.source.id for message in out if isinstance(message, Failure)] == ["a"]
    assert np.array_equal(joined([m for m in out if m.source.id == "b"], "b"), one_shot(tiny_mimi, audio(1)))
    # A second stream of that name starts from nothing.
    again = list(encode.run(waveform_pieces("a", audio(2))))
    assert np.array_equal(joined(again, "a"), one_shot(tiny_mimi, audio(2)))


def test_the_failure_of_an_unknown_stream_is_passed_on(tiny_mimi: MimiEncoder) -> None:
    (out,) = stage(tiny_mimi).run([failure("a")])
    assert isinstance(out, Failure)


def test_facts_come_with_the_last_piece(tiny_mimi: MimiEncoder) -> None:
    out = list(stage(tiny_mimi).run(waveform_pieces("a", audio(0), [19200])))
    assert out[-1].facts == AudioFacts(duration_seconds=1.0)
    assert {message.facts for message in out[:-1]} == {None}


def test_the_shape_of_a_piece(tiny_mimi: MimiEncoder) -> None:
    out = list(stage(tiny_mimi, piece_frames=16).run(waveform_pieces("a", audio(0))))
    assert [message.codes.shape for message in out] == [(NUM_CODEBOOKS, 16), (NUM_CODEBOOKS, 16), (NUM_CODEBOOKS, 8)]
    assert {message.codes.dtype for message in out} == {np.dtype(np.int16)}


def test_a_last_piece_may_be_empty(tiny_mimi: MimiEncoder) -> None:
    end = Waveform(source=source("a"), samples=np.zeros(0, np.float32), is_last=True, facts=AudioFacts())
    first = Waveform(source=source("a"), samples=audio(0, 3), is_last=False)
    assert np.array_equal(joined(list(stage(tiny_mimi).run([first, end])), "a"), one_shot(tiny_mimi, audio(0, 3)))


def test_pieces_go_out_as_soon_as_they_are_there(tiny_mimi: MimiEncoder) -> None:
    """Nothing more is pulled before what can be encoded has been handed on."""
    pulled: list[int] = []

    def inbox():
        for index, piece in enumerate(waveform_pieces("a", audio(0), range(19200, 76800, 19200))):
            pulled.append(index)
            yield piece

    out = stage(tiny_mimi, piece_frames=8).run(inbox())
    next(out)
    assert pulled == [0]


def test_the_input_is_not_written_to(tiny_mimi: MimiEncoder) -> None:
    """Arrays that come out of a shared object store are read only."""
    samples = audio(0)
    samples.setflags(write=False)
    list(stage(tiny_mimi).run(waveform_pieces("a", samples)))
