"""Peak memory of the generate stage over one very long stream: it should not grow with the stream.

    python -m benchmarks.memory --hours 1 --hours 24

Every duration runs in a process of its own. The decoder is tiny and its text head is zero, so that every guess of a
64-wide look-ahead holds and a day of audio passes in half a minute; ring, slots, feeding and collecting are the real
ones. Codes are made as they are pulled, as the encoder does it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from models.config import DecoderConfig, SpeechConfig
from models.decoder import Decoder
from pipeline.generate import GenerateStage
from pipeline.messages import AudioFacts, Codes, Source, Tokens

_CONFIG = DecoderConfig(
    dim=64,
    num_layers=2,
    num_heads=4,
    mlp_dim=88,
    context=375,
    rope_theta=1e5,
    norm_eps=1e-8,
    num_codebooks=32,
    audio_card=2048,
    text_card=4000,
)
_SPEECH = SpeechConfig(prefix_seconds=0, delay_seconds=0.5, padding_id=0, word_start_id=1)
_FRAME_RATE_HZ = 12.5
_PIECE_FRAMES = 125


def main() -> None:
    """Measure each duration in a fresh process and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, action="append")
    parser.add_argument("--one", action="store_true", help="measure in this process and print one JSON object")
    arguments = parser.parse_args()
    wanted: list[float] = arguments.hours or [1.0, 24.0]
    if arguments.one:
        print(json.dumps(_measure(wanted[0])))
        return
    found = [_in_process(one) for one in wanted]
    for row in found:
        hours, frames, seconds, peak = row["hours"], row["frames"], row["seconds"], row["peak_mib"]
        print(f"{hours:>5.1f} h {frames:>10,} frames {seconds:6.1f} s  peak {peak} MiB")
    ratio = found[-1]["peak_mib"] / found[0]["peak_mib"]
    print(json.dumps({"benchmark": "memory", "torch": torch.__version__, "rows": found, "ratio": round(ratio, 4)}))


def _in_process(hours: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", "--hours", str(hours)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(hours: float) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    decoder = Decoder(_CONFIG).requires_grad_(False)
    decoder.text_head.weight.zero_()
    stage = GenerateStage(decoder, _SPEECH, num_slots=2, lookahead=64)
    num_frames, begun = round(hours * 3600 * _FRAME_RATE_HZ), time.perf_counter()
    (tokens,) = stage.run(_pieces(num_frames))
    assert isinstance(tokens, Tokens)
    assert len(tokens.ids) == num_frames + 1
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "hours": hours,
        "frames": num_frames,
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mib": round(peak_mib, 1),
    }


def _pieces(num_frames: int) -> Iterator[Codes]:
    source, rng = Source(id="day", uri="synthetic"), np.random.default_rng(0)
    for first in range(0, num_frames, _PIECE_FRAMES):
        count = min(_PIECE_FRAMES, num_frames - first)
        codes = rng.integers(2048, size=(32, count), dtype=np.int16)
        is_last = first + count == num_frames
        yield Codes(source=source, codes=codes, is_last=is_last, facts=AudioFacts() if is_last else None)


if __name__ == "__main__":
    main()
