"""What the numbers mean: RTFx is audio seconds per wall second of a whole run, higher is better."""

import time
from collections import deque
from collections.abc import Callable

_RECENT_SECONDS = 60.0


class Rate:
    """Lifetime and last-minute RTFx from a growing count of audio seconds: a stall shows only in the second."""

    def __init__(self, *, total_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._total_seconds = total_seconds
        self._history: deque[tuple[float, float]] = deque([(self._begun, 0.0)])

    def update(self, audio_seconds: float) -> "Rate":
        """Take a new reading of the audio seconds done; the rate itself is returned."""
        now = self._clock()
        self._history.append((now, audio_seconds))
        while len(self._history) > 2 and self._history[1][0] <= now - _RECENT_SECONDS:
            self._history.popleft()
        return self

    @property
    def lifetime(self) -> float:
        """RTFx since the beginning."""
        now, seconds = self._history[-1]
        return seconds / (now - self._begun) if now > self._begun else 0.0

    @property
    def recent(self) -> float:
        """RTFx of the last minute."""
        (first, before), (last, after) = self._history[0], self._history[-1]
        return max(0.0, after - before) / (last - first) if last > first else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Wall seconds to go at the recent rate; None while nothing moves."""
        left = self._total_seconds - self._history[-1][1]
        return max(0.0, left) / self.recent if self.recent > 0 else None


def format_hours(audio_seconds: float) -> str:
    """Seconds of audio for people: `48 s`, `12.5 min`, `3.2 h`."""
    if round(audio_seconds) < 60:
        return f"{audio_seconds:.0f} s"
    if round(audio_seconds / 60, 1) < 60:
        return f"{audio_seconds / 60:.1f} min"
    return f"{audio_seconds / 3600:,.1f} h"
