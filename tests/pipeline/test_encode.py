"""A stream's codes are those of its audio, however it was cut, mixed with others or broken off."""

import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.mimi import MimiEncoder
from pipeline.encode import BatchEncodeStage, EncodeStage
from pipeline.messages import AudioFacts, Codes, Failure, Waveform
from tests.streams import failure, interleaved, source, waveform_pieces
from tests.tiny import FRAME_SAMPLES, NUM_CODEBOOKS, clip

NUM_FRAMES = 40


def audio(seed: int, num_frames: int = NUM_FRAMES) -> NDArray[np.float32]:
    return clip(seed, num_frames * FRAME_SAMPLES)


def stage(mimi: MimiEncoder, *, piece_frames: int = 7) -> EncodeStage:
    return EncodeStage(mimi, piece_seconds=piece_frames / 12.5)


def batch_stage(mimi: MimiEncoder, num_rows: int, *, piece_frames: int = 7) -> BatchEncodeStage:
    return BatchEncodeStage(mimi, num_rows=num_rows, piece_seconds=piece_frames / 12.5)


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


def cut_at_random(name: str, samples: NDArray[np.float32], seed: int) -> list[Waveform]:
    rng = random.Random(f"{name}{seed}")
    return waveform_pieces(name, samples, [rng.randrange(len(samples) + 1) for _ in range(rng.randrange(6))])


@given(
    num_rows=st.sampled_from((1, 2, 3, 5)),
    lengths=st.lists(st.integers(0, 33), min_size=1, max_size=8),
    piece_frames=st.sampled_from((1, 2, 5, 7)),
    ahead_seconds=st.sampled_from((0.0, 0.3, 40.0)),
    seed=st.integers(0, 1000),
)
def test_codes_of_a_batch_are_codes_alone(
    tiny_mimi: MimiEncoder,
    num_rows: int,
    lengths: list[int],
    piece_frames: int,
    ahead_seconds: float,
    seed: int,
) -> None:
    """Whatever the number of rows, the lengths, the cuts, the order of arrival and how much is pulled ahead."""
    clips = {str(index): audio(index, num_frames) for index, num_frames in enumerate(lengths)}
    pieces = [cut_at_random(name, samples, seed) for name, samples in clips.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.encode._AHEAD_SECONDS", ahead_seconds)
        encode = batch_stage(tiny_mimi, num_rows, piece_frames=piece_frames)
        out = list(encode.run(interleaved(pieces, seed)))
        for name, samples in clips.items():
            alone = list(batch_stage(tiny_mimi, num_rows, piece_frames=piece_frames).run(waveform_pieces("x", samples)))
            assert np.array_equal(joined(out, name), joined(alone, "x"))
            assert np.array_equal(joined(out, name), one_shot(tiny_mimi, samples))
    assert encode.num_pending == 0
    assert encode.num_frames == sum(lengths)
    assert encode.num_calls >= max(-(-num_frames // piece_frames) for num_frames in lengths)


def test_rows_are_filled_before_anything_is_encoded(tiny_mimi: MimiEncoder) -> None:
    """Short files of one loader come one after the other, and are encoded side by side all the same."""
    encode = batch_stage(tiny_mimi, 4)
    out = list(encode.run(piece for name in "abcdefgh" for piece in waveform_pieces(name, audio(0, 21))))
    assert {message.source.id for message in out} == set("abcdefgh")
    assert encode.num_calls == 2 * 3  # two rounds of four, three pieces each


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("where", range(5))
def test_a_failure_frees_its_row_and_ends_no_other(tiny_mimi: MimiEncoder, num_rows: int, where: int) -> None:
    """At any point of its stream, at work or still waiting for a row; nothing of the stream follows it."""
    names = "abcde"
    pieces: list[list[Waveform | Failure]] = [
        list(waveform_pieces(name, audio(index, 40), range(7680, 76800, 7680))) for index, name in enumerate(names)
    ]
    pieces[where][3 * where :] = [failure(names[where])]
    encode = batch_stage(tiny_mimi, num_rows, piece_frames=3)
    out = list(encode.run(interleaved(pieces, where)))
    assert [message.source.id for message in out if isinstance(message, Failure)] == [names[where]]
    mine = [message for message in out if message.source.id == names[where]]
    assert isinstance(mine[-1], Failure)
    for index, name in enumerate(names):
        if index != where:
            assert np.array_equal(joined(out, name), one_shot(tiny_mimi, audio(index, 40)))
    again = list(encode.run(waveform_pieces(names[where], audio(9, 12))))
    assert np.array_equal(joined(again, names[where]), one_shot(tiny_mimi, audio(9, 12)))


def test_facts_of_a_batch_come_with_the_last_piece(tiny_mimi: MimiEncoder) -> None:
    """Also where the last piece of audio is empty."""
    for cuts in ([], [19200], [76800]):
        out = list(batch_stage(tiny_mimi, 2, piece_frames=8).run(waveform_pieces("a", audio(0), cuts)))
        assert out[-1].facts == AudioFacts(duration_seconds=1.0)
        assert {message.facts for message in out[:-1]} == {None}


@pytest.mark.parametrize("order", ["first", "last", "side by side"])
def test_of_a_day_of_audio_little_is_there_at_a_time(
    tiny_mimi: MimiEncoder, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """A long source and a few short ones, with rows to spare all the time; on the scale of a tiny window."""
    monkeypatch.setattr("pipeline.encode._AHEAD_SECONDS", 0.5)
    piece_samples, num_rows = 10 * FRAME_SAMPLES, 3
    long = waveform_pieces("long", audio(0, 400), range(piece_samples, 400 * FRAME_SAMPLES, piece_samples))
    short = [waveform_pieces(name, audio(1, 7)) for name in "ab"]
    streams = {
        "first": [*long, *short[0], *short[1]],
        "last": [*short[0], *short[1], *long],
        "side by side": list(interleaved([long, *short], 0)),
    }
    encode, most = batch_stage(tiny_mimi, num_rows, piece_frames=2), 0

    def watched() -> Iterator[Waveform]:
        nonlocal most
        for message in streams[order]:
            yield message
            most = max(most, encode.num_pending)

    out = list(encode.run(watched()))
    assert np.array_equal(joined(out, "long"), one_shot(tiny_mimi, audio(0, 400)))
    assert most <= num_rows * 0.5 * 24_000 + piece_samples


def test_a_slow_source_keeps_nobody_waiting(tiny_mimi: MimiEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream stops half-way through a piece: the others are encoded to their ends before it goes on."""
    monkeypatch.setattr("pipeline.encode._AHEAD_SECONDS", 0.0)
    slow, first, second = (waveform_pieces(name, audio(0, 13), [19200]) for name in ("slow", "a", "b"))
    out = list(batch_stage(tiny_mimi, 2, piece_frames=4).run([slow[0], *first, *second, slow[1]]))
    ends = [message.source.id for message in out if message.is_last]
    assert ends == ["a", "b", "slow"]
    assert np.array_equal(joined(out, "slow"), one_shot(tiny_mimi, audio(0, 13)))


def encode_in_threads(
    encode: BatchEncodeStage, inboxes: Sequence[Sequence[Waveform | Failure]]
) -> list[list[Codes | Failure]]:
    """Every inbox by a thread of its own, as the open shards of an actor are."""
    out: list[list[Codes | Failure]] = [[] for _ in inboxes]
    threads = [
        threading.Thread(target=lambda index=index, inbox=inbox: out[index].extend(encode.run(inbox)), daemon=True)
        for index, inbox in enumerate(inboxes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return out


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("ahead_seconds", [0.0, 2.0])
def test_threads_share_the_rows_and_get_what_is_theirs(
    tiny_mimi: MimiEncoder, monkeypatch: pytest.MonkeyPatch, num_rows: int, ahead_seconds: float
) -> None:
    """More threads than rows, too: those without a row wait for one."""
    monkeypatch.setattr("pipeline.encode._AHEAD_SECONDS", ahead_seconds)
    names = [[f"{shard}{number}" for number in range(4)] for shard in range(5)]
    clips = {name: audio(index, 3 + index) for index, name in enumerate(name for shard in names for name in shard)}
    inboxes = [[piece for name in shard for piece in cut_at_random(name, clips[name], 0)] for shard in names]
    out = encode_in_threads(batch_stage(tiny_mimi, num_rows, piece_frames=4), inboxes)
    for shard, messages in zip(names, out, strict=True):
        assert {message.source.id for message in messages} == set(shard)
        for name in shard:
            assert np.array_equal(joined(messages, name), one_shot(tiny_mimi, clips[name]))


def test_an_abandoned_inbox_gives_its_rows_back(tiny_mimi: MimiEncoder) -> None:
    encode = batch_stage(tiny_mimi, 1, piece_frames=2)
    abandoned = encode.run(waveform_pieces("a", audio(0)))
    next(abandoned)
    abandoned.close()
    assert encode.num_pending == 0
    out = list(encode.run(waveform_pieces("b", audio(1))))
    assert np.array_equal(joined(out, "b"), one_shot(tiny_mimi, audio(1)))


def test_after_an_exception_of_the_model_no_codes_come_out(
    tiny_mimi: MimiEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no thread: the rows were left in the middle of a call. Codes that are wrong would be worse than none."""
    encode = batch_stage(tiny_mimi, 2, piece_frames=2)
    before = encode.run(waveform_pieces("a", audio(0)))
    next(before)
    with monkeypatch.context() as patch:
        patch.setattr("models.quantizer.SplitQuantizer.forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(encode.run(waveform_pieces("b", audio(1))))
    for run in (before, encode.run(waveform_pieces("c", audio(2)))):
        with pytest.raises(RuntimeError, match="failed in an earlier call"):
            list(run)


def test_a_stream_without_an_end_is_noticed(tiny_mimi: MimiEncoder) -> None:
    with pytest.raises(AssertionError, match="a stream has no end"):
        list(batch_stage(tiny_mimi, 2).run(waveform_pieces("a", audio(0), [19200])[:1]))
