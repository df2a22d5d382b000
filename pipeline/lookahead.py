"""How many positions per pass: whatever has lately given the most tokens per second.

A wider pass gives more tokens where its guesses hold, and costs more where the machine is bound by arithmetic rather
than by reading weights. Neither is known beforehand, and both change with the audio and with how many slots are taken,
so both are measured while the work goes on. The choice changes speed only, never a token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

# Twice as wide gives at most twice the tokens; the study of a trained model found little beyond 8 at these batches.
WIDTHS = (1, 2, 4, 8)
_FIRST_TRIES = (
    3  # passes of each width before a choice is made; the first of a width pays for its set-up and is dropped
)
_TRY_AGAIN_EVERY = 50  # passes, then a neighbour of the present width has its turn
_MEMORY = 0.8  # weight of the past in the running means


@dataclass(slots=True)
class _Width:
    """What is known of one width."""

    width: int
    tries: int = 0
    seconds: float = 0.0  # per pass
    tokens: float = 0.0  # per pass

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Lookahead:
    """Chooses the width of each pass and learns from what it cost and gave."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._known = [_Width(width) for width in widths]
        self._clock = clock
        self._passes = 0
        self._current = self._known[0]
        self._begun = 0.0

    def begin(self) -> int:
        """The width of the pass that starts now."""
        self._current = self._next()
        self._passes += 1
        self._begun = self._clock()
        return self._current.width

    def end(self, num_tokens: int) -> None:
        """The pass is over and gave `num_tokens`."""
        now, seen = self._clock() - self._begun, self._current
        seen.tries += 1
        if seen.tries <= 2:
            seen.seconds, seen.tokens = now, float(num_tokens)
            return
        seen.seconds += (1 - _MEMORY) * (now - seen.seconds)
        seen.tokens += (1 - _MEMORY) * (num_tokens - seen.tokens)

    @property
    def best(self) -> int:
        """The width that has lately given the most tokens per second."""
        return max(self._known, key=lambda known: known.rate).width

    def _next(self) -> _Width:
        for known in self._known:
            if known.tries < _FIRST_TRIES:
                return known
        index = max(range(len(self._known)), key=lambda i: self._known[i].rate)
        if self._passes % _TRY_AGAIN_EVERY == 0:
            step = 1 if self._passes // _TRY_AGAIN_EVERY % 2 else -1
            index = min(max(index + step, 0), len(self._known) - 1)
        return self._known[index]
