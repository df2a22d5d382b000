"""The bundled speech, and as many clips as a test wants, made of it."""

import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soxr
from numpy.typing import NDArray

ROOT = Path(__file__).parent / "data" / "speech"


def bundled() -> list[Path]:
    """Every bundled clip, in a fixed order."""
    return sorted([*ROOT.glob("digits/*.wav"), *ROOT.glob("people/**/*.wav"), *ROOT.glob("people/**/*.flac")])


def samples_of(path: Path) -> NDArray[np.float32]:
    """`[S]` at 24 kHz."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate_hz = container.streams.audio[0].rate
    pcm = np.concatenate(parts, axis=1)[0].astype(np.float32) / 32768
    return pcm if rate_hz == 24_000 else soxr.resample(pcm, rate_hz, 24_000, quality="HQ").astype(np.float32)


def clips(count: int, *, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Seeded clips of 0.3 to 6 s: cuts and pairs of the bundled ones, at different levels."""
    rng = random.Random(seed)
    pool = [samples_of(path) for path in bundled()]
    for _ in range(count):
        clip = rng.choice(pool)
        if rng.random() < 0.3:
            clip = np.concatenate([clip, np.zeros(rng.randrange(12_000), np.float32), rng.choice(pool)])
        length = rng.randrange(7_200, 144_000)
        begin = rng.randrange(max(1, len(clip) - length))
        yield (clip[begin : begin + length] * rng.uniform(0.3, 1.0)).astype(np.float32)
