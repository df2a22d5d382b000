"""A row's codes are those of its stream alone: not of the row, its neighbours, or who had it before."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.mimi import MimiEncoder
from models.rows import EncoderRows
from tests.tiny import FRAME_SAMPLES, NUM_CODEBOOKS, clip

PIECE = 3


def audio(seed: int, num_frames: int) -> NDArray[np.float32]:
    return clip(seed, num_frames * FRAME_SAMPLES)


def one_shot(mimi: MimiEncoder, samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return mimi.encode(torch.from_numpy(samples)[None])[0].numpy().astype(np.int16)


@given(num_rows=st.integers(1, 5), order=st.lists(st.integers(0, 4), min_size=12, max_size=40), data=st.data())
def test_rows_that_go_on_at_different_times_do_not_meet(
    tiny_mimi: MimiEncoder, num_rows: int, order: list[int], data: st.DataObject
) -> None:
    """In every call another set of rows takes part; where a stream is at its end, the next begins in its row."""
    rows = EncoderRows(tiny_mimi, num_rows, piece_frames=PIECE)
    streams = [audio(row, 2 + 7 * row) for row in range(num_rows)]
    left, codes = list(streams), [np.zeros((NUM_CODEBOOKS, 0), np.int16)] * num_rows
    rows.start(range(num_rows))
    for count in order:
        some = data.draw(st.permutations(range(num_rows)))[: count + 1]
        pieces = {row: left[row][: rows.piece_samples] for row in some}
        for row, new in rows.encode(pieces).items():
            left[row] = left[row][rows.piece_samples :]
            codes[row] = np.concatenate([codes[row], new], axis=1)
        over = [row for row in some if not len(left[row])]
        for row in over:
            assert np.array_equal(codes[row], one_shot(tiny_mimi, streams[row]))
            left[row] = streams[row] = audio(row + 10, 5)
            codes[row] = codes[row][:, :0]
        rows.start(over)
    for row in range(num_rows):
        assert np.array_equal(codes[row], one_shot(tiny_mimi, streams[row])[:, : codes[row].shape[1]])


def test_audio_is_the_same_in_every_row(tiny_mimi: MimiEncoder) -> None:
    rows = EncoderRows(tiny_mimi, 5, piece_frames=7)
    codes = rows.encode(dict.fromkeys(range(5), audio(0, 7)))
    assert all(np.array_equal(codes[0], codes[row]) for row in range(5))
    assert codes[0].dtype == np.int16


def test_a_piece_is_whole_frames_and_not_too_long(tiny_mimi: MimiEncoder) -> None:
    rows = EncoderRows(tiny_mimi, 2, piece_frames=PIECE)
    for num_samples in (FRAME_SAMPLES + 1, (PIECE + 1) * FRAME_SAMPLES):
        with pytest.raises(ValueError, match=rf"{num_samples} samples are not whole frames, 3 at most"):
            rows.encode({1: clip(0, num_samples)})
