"""Side by side in one process: our encode and generate stages, transformers' batched `generate`, moshi's batched steps.

    python -m benchmarks.peers --shape 60m --clips 24

Same random weights (written once in both formats), same padded audio, float32, repeats in turns. Both peers get their
clips sorted by length, each batch padded to its longest; each gets the best of several batch sizes, and transformers
also the best of its two caches. Before anything is timed, tokens are compared. All three are bound by the same
products; what differs is how many rows a product has, and how many of them are of use.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import transformers
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_compile
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import KyutaiSpeechToTextForConditionalGeneration as TheirModel

from benchmarks.checkpoints import Written, write_both
from benchmarks.engine import table
from models.checkpoint import Checkpoint, open_checkpoint
from models.decoder import Decoder
from models.mimi import MimiEncoder
from models.packing import pack
from models.shapes import SHAPES, Shape
from pipeline.bench import Stopwatch
from pipeline.encode import EncodeStage
from pipeline.generate import GenerateStage
from pipeline.messages import Tokens, Waveform
from pipeline.workload import MIXES, Workload, make_workload, noise

Ids = list[NDArray[np.int64]]  # tokens of every clip, in the clips' order


@dataclass(slots=True)
class Entry:
    """One system at one setting."""

    system: str
    setting: str
    run: Callable[[], Ids]
    wall_seconds: list[float] = field(default_factory=list)

    def time(self) -> Ids:
        """Run once more, on the clock."""
        begun = time.perf_counter()
        ids = self.run()
        self.wall_seconds.append(time.perf_counter() - begun)
        return ids


@dataclass(slots=True, kw_only=True)
class Ours:
    """Our two stages, kept between runs as an actor keeps them."""

    mimi: MimiEncoder
    decoder: Decoder
    checkpoint: Checkpoint
    waveforms: Sequence[Waveform]
    encode_seconds: list[float] = field(default_factory=list)

    def run(self, num_slots: int, lookahead: int) -> Ids:
        """-> F + 1 tokens of every clip of F frames."""
        generate = GenerateStage(self.decoder, self.checkpoint.speech, num_slots=num_slots, lookahead=lookahead)
        encoded = Stopwatch(EncodeStage(self.mimi, piece_seconds=10.0).run(self.waveforms))
        ids = {out.source.id: out.ids for out in generate.run(encoded) if isinstance(out, Tokens)}
        self.encode_seconds.append(encoded.seconds)
        return [ids[waveform.source.id].astype(np.int64) for waveform in self.waveforms]


def run_transformers(
    model: TheirModel, samples: Sequence[NDArray[np.float32]], *, batch_size: int, cache: str | None
) -> Ids:
    """-> F tokens of every clip: BOS, f0 .. f(F-2); what they emit in a shorter clip's padding is cut off."""
    ids: Ids = [np.empty(0, np.int64)] * len(samples)
    model.generation_config.cache_implementation = cache
    for batch in batches(samples, batch_size):
        out = model.generate(input_values=padded(samples, batch)[:, None])[:, 1:].numpy()
        for row, clip in enumerate(batch):
            ids[clip] = out[row, : num_frames(samples[clip])]
    return ids


def run_moshi(mimi: MimiModel, lm: LMModel, samples: Sequence[NDArray[np.float32]], *, batch_size: int) -> Ids:
    """-> F tokens of every clip: BOS, f1 .. f(F-1), as their evaluation script steps."""
    ids: Ids = [np.empty(0, np.int64)] * len(samples)
    generator = LMGen(lm, use_sampling=False)
    for batch in batches(samples, batch_size):
        frames = padded(samples, batch)[:, None].split(mimi.frame_size, dim=2)
        with torch.no_grad(), mimi.streaming(len(batch)), generator.streaming(len(batch)):
            out = torch.cat([tokens_of(generator, mimi.encode(frame)) for frame in frames], dim=1).numpy()
        for row, clip in enumerate(batch):
            ids[clip] = out[row, : num_frames(samples[clip])]
    return ids


def tokens_of(generator: LMGen, codes_BK1: Tensor) -> Tensor:
    """One step -> `[B, 1]`."""
    tokens = generator.step(codes_BK1)
    assert tokens is not None  # all delays are 0, so there is a token from the first step on
    return tokens[:, 0]


def batches(samples: Sequence[NDArray[np.float32]], batch_size: int) -> Iterator[list[int]]:
    """Clips of similar lengths together, longest first."""
    order = sorted(range(len(samples)), key=lambda clip: -len(samples[clip]))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def padded(samples: Sequence[NDArray[np.float32]], batch: Sequence[int]) -> Tensor:
    """`[B, S]`, zeros after the shorter clips."""
    longest = max(len(samples[clip]) for clip in batch)
    return torch.from_numpy(np.stack([np.pad(samples[clip], (0, longest - len(samples[clip]))) for clip in batch]))


def num_frames(samples: NDArray[np.float32]) -> int:
    """Whole frames of one clip; every shape has the released frame."""
    return len(samples) // 1920


def assert_equal_tokens(
    ours: Ours, written: Written, theirs: TheirModel, mimi: MimiModel, lm: LMModel
) -> dict[str, int]:
    """Token for token on the first clips; -> how many were compared.

    moshi's streaming Mimi has another window (`ring`) and its plain steps another alignment: we take both on.
    """
    few = ours.waveforms[:4]
    samples = [waveform.samples for waveform in few]
    counts: dict[str, int] = {}
    expected = run_transformers(theirs, samples, batch_size=len(few), cache=None)
    plain = Ours(mimi=ours.mimi, decoder=ours.decoder, checkpoint=ours.checkpoint, waveforms=few).run(3, 4)
    counts["transformers"] = _compare("transformers", [ids[:-1] for ids in plain], expected)
    ring = EncodeStage(ours.checkpoint.load_mimi(window="ring"), piece_seconds=10.0)
    stage = GenerateStage(
        ours.decoder, ours.checkpoint.speech, num_slots=3, lookahead=4, alignment="bos-replaces-first"
    )
    like_moshi = {out.source.id: out.ids for out in stage.run(ring.run(few)) if isinstance(out, Tokens)}
    expected = run_moshi(mimi, lm, samples, batch_size=len(few))
    counts["moshi"] = _compare("moshi", [like_moshi[waveform.source.id] for waveform in few], expected)
    return counts


def _compare(peer: str, ours: Sequence[NDArray[Any]], theirs: Ids) -> int:
    for clip, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if not np.array_equal(mine, other):
            same = min(len(mine), len(other))
            first = int(np.argmax(mine[:same] != other[:same]))
            raise SystemExit(
                f"tokens of clip {clip} differ from {peer}'s at {first}: {len(mine)} and {len(other)} tokens"
            )
    if max(len(np.unique(ids)) for ids in theirs) < 5:
        raise SystemExit(f"{peer} emits next to nothing but padding: equality proves nothing")
    return sum(map(len, theirs))


def main(arguments: list[str] | None = None) -> None:
    """Compare and print."""
    options = _parse(arguments)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder, no_compile():
        written = write_both(Path(folder), shape, padding_weight=options.padding_weight)
        facts = compare(options, shape, written)
    print_report(facts)
    print(json.dumps(facts))


def compare(options: argparse.Namespace, shape: Shape, written: Written) -> dict[str, Any]:
    """Load, assert, warm up, choose, repeat."""
    workload = make_workload(
        options.mix,
        num_clips=options.clips,
        speech=shape.speech,
        frame_rate_hz=shape.mimi.frame_rate_hz,
        longest_seconds=options.seconds,
    )
    waveforms = list(noise(workload, mimi=shape.mimi, prefix_seconds=shape.speech.prefix_seconds))
    checkpoint = open_checkpoint(written.trfs)
    ours = Ours(
        mimi=checkpoint.load_mimi(), decoder=pack(checkpoint.load_decoder()), checkpoint=checkpoint, waveforms=waveforms
    )
    theirs = cast(TheirModel, TheirModel.from_pretrained(written.trfs))
    theirs.eval()
    their_mimi = loaders.get_mimi(None, written.mimi_config, num_codebooks=shape.mimi.num_codebooks)
    their_mimi.load_state_dict(load_file(written.original / "mimi.safetensors"), strict=False)
    their_lm = loaders.get_moshi_lm(written.original / "model.safetensors", written.lm_kwargs, dtype=torch.float32)
    _say("comparing tokens")
    equal = assert_equal_tokens(ours, written, theirs, their_mimi, their_lm)
    samples = [waveform.samples for waveform in waveforms]
    candidates = [
        [
            Entry("kikitori", f"{slots} slots, look-ahead {lookahead}", lambda s=slots, k=lookahead: ours.run(s, k))
            for slots in options.slots
            for lookahead in options.lookahead
        ],
        [
            Entry(
                "transformers",
                f"batch {batch}, {cache or 'dynamic'} cache",
                lambda b=batch, c=cache: run_transformers(theirs, samples, batch_size=b, cache=c),
            )
            for batch in options.batches
            for cache in (None, "static")
        ],
        [
            Entry("moshi", f"batch {batch}", lambda b=batch: run_moshi(their_mimi, their_lm, samples, batch_size=b))
            for batch in options.batches
        ],
    ]
    best = [_best(entries) for entries in candidates]
    ours.encode_seconds.clear()
    for _ in range(options.repeats):
        for entry in best:
            entry.time()
            _say(f"{entry.system}, {entry.setting}: {entry.wall_seconds[-1]:.2f} s")
    return _facts(options, workload, best, candidates, ours, equal)


def _best(entries: Sequence[Entry]) -> Entry:
    """The fastest after one run each, which was everybody's warm-up; its clock begins anew."""
    for entry in entries:
        entry.time()
        _say(f"choosing: {entry.system}, {entry.setting}: {entry.wall_seconds[-1]:.2f} s")
    best = min(entries, key=lambda entry: entry.wall_seconds[0])
    return Entry(best.system, best.setting, best.run)


def _facts(
    options: argparse.Namespace,
    workload: Workload,
    best: Sequence[Entry],
    candidates: Sequence[Sequence[Entry]],
    ours: Ours,
    equal: dict[str, int],
) -> dict[str, Any]:
    first = median(best[0].wall_seconds)
    return {
        "shape": options.shape,
        "mix": workload.mix,
        "clips": len(workload.speech_seconds),
        "credited_seconds": round(workload.credited_seconds, 2),
        "step_seconds": round(workload.step_seconds, 2),
        "padding_weight": options.padding_weight,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "equal_tokens": equal,
        "encode_seconds": round(median(ours.encode_seconds), 3),
        "systems": [
            {
                "system": entry.system,
                "setting": entry.setting,
                "rtfx": round(workload.credited_seconds / median(entry.wall_seconds), 2),
                "ours_is_faster": round(median(entry.wall_seconds) / first, 2),
                "wall_seconds": [round(seconds, 3) for seconds in entry.wall_seconds],
            }
            for entry in best
        ],
        "tried_once": {
            f"{entry.system}, {entry.setting}": round(entry.wall_seconds[0], 3)
            for entries in candidates
            for entry in entries
        },
    }


def print_report(facts: dict[str, Any]) -> None:
    """Tables for people."""
    same = ", ".join(f"{count} tokens equal to {peer}'s" for peer, count in facts["equal_tokens"].items())
    print(
        f"shape {facts['shape']}, {facts['mix']}: {facts['clips']} clips, {facts['credited_seconds']} s of speech, "
        f"{facts['step_seconds']} s of frames; float32, {facts['threads']} threads; {same}"
    )
    rows = [("system", "best setting", "RTFx", "ours is faster", "median s", "fastest s", "slowest s")]
    for system in facts["systems"]:
        walls = system["wall_seconds"]
        middle, fastest, slowest = (f"{value:.2f}" for value in (median(walls), min(walls), max(walls)))
        rtfx, faster = f"{system['rtfx']:.2f}", f"{system['ours_is_faster']:.2f}x"
        rows.append((str(system["system"]), str(system["setting"]), rtfx, faster, middle, fastest, slowest))
    print(table(rows))
    print(f"of our time, {facts['encode_seconds']:.2f} s is encoding")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--mix", choices=MIXES, default="librispeech")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seconds", type=float, help="cut clips to this length")
    parser.add_argument("--slots", type=_numbers, default=(8, 16), metavar="N,N", help="of ours")
    parser.add_argument("--lookahead", type=_numbers, default=(1, 4), metavar="K,K", help="of ours")
    parser.add_argument("--batches", type=_numbers, default=(8, 24), metavar="N,N", help="of the peers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--padding-weight", type=float, default=0.0, help="more makes more tokens padding")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
