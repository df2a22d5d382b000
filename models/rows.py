"""Streams side by side in one batched Mimi: every call has the same shape, whoever is there.

Same shape, same kernels: the codes of a stream cannot depend on how many others are encoded with it, nor on what they
say. A piece that ends a stream is shorter and filled up with silence, whose codes are dropped; the encoder is causal,
so the frames before it do not hear it. A row that has nothing to encode computes silence and keeps its state.
"""

# R rows, S samples, K codebooks, T frames.

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models.mimi import MimiEncoder


class EncoderRows:
    """`num_rows` places, and the state of the streams that have them.

    Args:
        piece_frames: frames of every row that one call encodes.
    """

    def __init__(self, mimi: MimiEncoder, num_rows: int, *, piece_frames: int) -> None:
        self._mimi = mimi
        self._device = mimi.downsample.weight.device
        self._state = mimi.new_state(num_rows, max_frames=piece_frames)
        self.num_rows, self.piece_frames = num_rows, piece_frames
        self.piece_samples = piece_frames * mimi.config.frame_samples

    def start(self, rows: Sequence[int]) -> None:
        """Streams begin in these rows; whatever was there is forgotten."""
        if rows:
            self._state.reset(torch.tensor(rows, device=self._device))

    def encode(self, pieces: Mapping[int, NDArray[np.float32]]) -> dict[int, NDArray[np.int16]]:
        """The next samples of some rows -> their codes, `[K, T]` each.

        Args:
            pieces: by row, whole frames each and `piece_samples` at most; fewer only where the stream ends.

        Raises:
            ValueError: a piece is longer than that, or ends within a frame.
        """
        samples_RS = np.zeros((self.num_rows, self.piece_samples), np.float32)
        moving_R = np.zeros(self.num_rows, np.bool_)
        for row, samples in pieces.items():
            if len(samples) > self.piece_samples or len(samples) % self._mimi.config.frame_samples:
                raise ValueError(f"{len(samples)} samples are not whole frames, {self.piece_frames} at most")
            samples_RS[row, : len(samples)] = samples
            moving_R[row] = True
        codes_RKT = self._mimi.encode(
            torch.from_numpy(samples_RS).to(self._device),
            self._state,
            moving_B=torch.from_numpy(moving_R).to(self._device),
        )
        codes = codes_RKT.to(torch.int16).cpu().numpy()
        # Copies: a view would keep the codes of all rows for as long as one of them is needed.
        return {row: codes[row, :, : self._num_frames(samples)].copy() for row, samples in pieces.items()}

    def _num_frames(self, samples: NDArray[np.float32]) -> int:
        return len(samples) // self._mimi.config.frame_samples
