"""A set of source ids that costs 16 bytes each: ten million are 160 MB, where Python strings in a set take 1.4 GB.

All 128 bits of an id are kept. With 64 of them, two of ten million ids would be taken for one with a probability of
n^2 / 2^65 = 3e-6, and the input that lost would vanish without a row; at a hundred million it would be 3e-4.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ID_DIGITS = 32
# Runs longer than this are not merged any more: a merge holds both runs twice.
_MAX_MERGED = 2_000_000

_Halves = NDArray[np.uint64]  # [N]
_DIGITS = np.full(256, 255, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


class KnownIds:
    """Ids, all of 32 hexadecimal digits. Kept as sorted runs, the short ones merged as they come."""

    def __init__(self) -> None:
        self._runs: list[tuple[_Halves, _Halves]] = []  # upper and lower 64 bits, sorted by the upper

    def __len__(self) -> int:
        return sum(len(upper) for upper, _ in self._runs)

    def add(self, ids: Sequence[str]) -> None:
        """Ids that are not in here yet, and differ from each other."""
        if not ids:
            return
        self._runs.append(_sorted(*_halves(ids)))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= min(len(self._runs[-1][0]), _MAX_MERGED // 2):
            (upper, lower), (more_upper, more_lower) = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(np.concatenate([upper, more_upper]), np.concatenate([lower, more_lower])))

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which of `ids` are in here: `[N]`."""
        if not ids:
            return np.zeros(0, np.bool_)
        upper, lower = _halves(ids)
        # In order, neighbours are looked for in the same pages of memory: 1.3 us each instead of 5.8, 8 million known.
        order = np.argsort(upper)
        found = np.zeros(len(ids), np.bool_)
        for run in self._runs:
            found[order] |= _held(run, upper[order], lower[order])
        return found


def _held(run: tuple[_Halves, _Halves], upper: _Halves, lower: _Halves) -> NDArray[np.bool_]:
    run_upper, run_lower = run
    first = np.minimum(np.searchsorted(run_upper, upper), len(run_upper) - 1)
    is_like = run_upper[first] == upper
    held = is_like & (run_lower[first] == lower)
    for index in np.flatnonzero(is_like & ~held):  # different ids whose upper halves are the same: hardly ever
        alike = slice(first[index], np.searchsorted(run_upper, upper[index], "right"))
        held[index] = bool((run_lower[alike] == lower[index]).any())
    return held


def _halves(ids: Sequence[str]) -> tuple[_Halves, _Halves]:
    values = _DIGITS[np.frombuffer("".join(ids).encode("ascii"), np.uint8)]
    assert len(values) % _ID_DIGITS == 0, f"{len(values)} digits are no ids"
    assert not len(values) or values.max() < 16, "an id holds something else than hexadecimal digits"
    numbers = ((values[0::2] << 4) | values[1::2]).view(">u8").astype(np.uint64).reshape(-1, 2)
    return numbers[:, 0].copy(), numbers[:, 1].copy()


def _sorted(upper: _Halves, lower: _Halves) -> tuple[_Halves, _Halves]:
    order = np.argsort(upper, kind="stable")
    return upper[order], lower[order]
