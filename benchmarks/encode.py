"""The encode stage alone, over rows, length of pieces and precision, with what the machine allows beside it.

    python -m benchmarks.encode --shape 2.6b --rows 1,8,16,32 --piece-frames 12,25,125 --precision float32,tf32,bfloat16

SEANet's convolutions at 24 kHz bound it: on a GPU by launching kernels where rows are few and pieces short, else by
moving activations and by arithmetic. Random weights of the true shape; needs torch, numpy, safetensors, sentencepiece.
Audio seconds are those of all frames, the padding of every clip included: that is what the encoder has to do.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine import table
from models.config import MimiConfig
from models.mimi import MimiEncoder
from models.precision import Precision, float32_products
from models.roofline import Machine, encode_cost
from models.rows import EncoderRows
from models.shapes import SHAPES, random_mimi
from pipeline.encode import BatchEncodeStage, EncodeStage
from pipeline.messages import Codes, Waveform
from pipeline.workload import MIXES, make_workload, noise

_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_HEADINGS = ("precision", "rows", "frames", "RTFx", "spread", "surplus", "of limit", "peak MiB", "= cb 1", "= cb 8")
_HEADINGS_END = ("= cb 32", "= frames", "rows alike")
_REFERENCE_FRAMES = 125
# A matrix product and a copy that are far beyond any cache of the kind of device.
_PROBE_SIDE = {"cpu": 1024, "cuda": 8192}
_PROBE_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


@dataclass(slots=True, kw_only=True)
class Setting:
    """One way to encode, and what came of it."""

    precision: Precision
    num_rows: int
    piece_frames: int
    wall_seconds: list[float] = field(default_factory=list[float])
    surplus: float = 0.0  # frames computed for nothing, per useful frame
    peak_bytes: int | None = None  # of the device's memory, weights included; None on a CPU
    agreement: dict[str, float] = field(default_factory=dict[str, float])
    rows_alike: bool = True  # whether the same audio has the same codes in every row


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, speech = SHAPES[options.shape].mimi, SHAPES[options.shape].speech
    if device.type == "cpu":
        options.precision = tuple(precision for precision in options.precision if precision != "tf32")
    workload = make_workload(
        options.mix,
        num_clips=options.clips or 8 * max(options.rows),
        speech=speech,
        frame_rate_hz=config.frame_rate_hz,
        longest_seconds=options.seconds,
    )
    waveforms = list(noise(workload, mimi=config, prefix_seconds=speech.prefix_seconds))
    settings = measure(options, config, waveforms, device=device)
    machines = {precision: probe(precision, device=device) for precision in options.precision}
    rows = [_as_json(one, config, machines[one.precision], workload.step_seconds) for one in settings]
    facts = {
        "shape": options.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "mix": options.mix,
        "clips": len(waveforms),
        "audio_seconds": round(workload.step_seconds, 2),
        "credited_seconds": round(workload.credited_seconds, 2),
        "gigaflops_per_audio_second": round(encode_cost(config, seconds=1, itemsize=4).flops / 1e9, 3),
        "machine": {
            precision: {
                "gigabytes_per_second": round(machine.bytes_per_second / 1e9, 1),
                "gigaflops_per_second": round(machine.flops_per_second / 1e9, 1),
            }
            for precision, machine in machines.items()
        },
        "encode": rows,
    }
    if options.decoder_rtfx:
        best = max(rows, key=lambda row: row["rtfx"])
        facts["encoder_to_decoder"] = round(best["rtfx"] / options.decoder_rtfx, 2)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "encode"))
    print(table([_HEADINGS + _HEADINGS_END, *map(_as_cells, rows)]))
    print(json.dumps(facts))


def measure(
    options: argparse.Namespace, config: MimiConfig, waveforms: Sequence[Waveform], *, device: torch.device
) -> list[Setting]:
    """Every setting; repeats go round all settings of a precision, so that a slow minute hits all."""
    reference = random_mimi(config, device=device)
    expected = encode(EncodeStage(reference, piece_seconds=_REFERENCE_FRAMES / config.frame_rate_hz), waveforms)
    settings: list[Setting] = []
    for precision in options.precision:
        mimi = random_mimi(config, device=device).set_precision(precision)
        mine = [
            Setting(precision=precision, num_rows=rows, piece_frames=frames)
            for rows in options.rows
            for frames in options.piece_frames
        ]
        for one in mine:
            print(f"{precision}, {one.num_rows} rows, {one.piece_frames} frames", file=sys.stderr)
            _warm_up(one, mimi, waveforms, expected)
        for _ in range(options.repeats):
            for one in mine:
                _time(one, mimi, waveforms)
        settings += mine
        del mimi
        gc.collect()
    return settings


def encode(stage: EncodeStage | BatchEncodeStage, waveforms: Sequence[Waveform]) -> NDArray[np.int16]:
    """All clips once; -> their codes one after the other, `[K, T]`, clips in the order of `waveforms`."""
    pieces: dict[str, list[NDArray[np.int16]]] = {waveform.source.id: [] for waveform in waveforms}
    for message in stage.run(waveforms):
        pieces[message.source.id].append(cast(Codes, message).codes)
    return np.concatenate([piece for clip in pieces.values() for piece in clip], axis=1)


def make_stage(one: Setting, mimi: MimiEncoder) -> EncodeStage | BatchEncodeStage:
    """The stage as a lane has it: one row means every stream by itself, its last piece not filled up."""
    seconds = one.piece_frames / mimi.config.frame_rate_hz
    if one.num_rows == 1:
        return EncodeStage(mimi, piece_seconds=seconds)
    return BatchEncodeStage(mimi, num_rows=one.num_rows, piece_seconds=seconds)


def agreement(codes_KT: NDArray[np.int16], expected_KT: NDArray[np.int16]) -> dict[str, float]:
    """Shares of equal codes of the first, eighth and last codebook, and of frames that are equal altogether."""
    same_KT = codes_KT == expected_KT
    books = {f"codebook_{book}": float(same_KT[book - 1].mean()) for book in (1, 8, 32) if book <= len(same_KT)}
    return books | {"frames": float(same_KT.all(axis=0).mean())}


def probe(precision: Precision, *, device: torch.device) -> Machine:
    """Measure the memory bus with a large copy, and arithmetic of this precision with a large square product."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    numel, side = _PROBE_BYTES[device.type] // dtype.itemsize, _PROBE_SIDE[device.type]
    source, target = (torch.zeros(numel, device=device, dtype=dtype) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with float32_products("tf32" if precision == "tf32" else "ieee"):
        product_seconds = _best_seconds(lambda: left @ right, device)
    return Machine(
        bytes_per_second=2 * numel * dtype.itemsize / _best_seconds(lambda: target.copy_(source), device),
        flops_per_second=2 * side**3 / product_seconds,
    )


def _warm_up(one: Setting, mimi: MimiEncoder, waveforms: Sequence[Waveform], expected_KT: NDArray[np.int16]) -> None:
    """Once through everything, off the clock: what is learnt does not depend on time."""
    on_gpu = mimi.downsample.weight.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = make_stage(one, mimi)
    codes_KT = encode(stage, waveforms)
    one.agreement = agreement(codes_KT, expected_KT)
    if isinstance(stage, BatchEncodeStage):
        one.surplus = stage.num_calls * one.num_rows * one.piece_frames / stage.num_frames - 1
    one.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
    one.rows_alike = _rows_are_alike(one, mimi, waveforms)


def _rows_are_alike(one: Setting, mimi: MimiEncoder, waveforms: Sequence[Waveform]) -> bool:
    rows = EncoderRows(mimi, one.num_rows, piece_frames=one.piece_frames)
    longest = max(waveforms, key=lambda waveform: len(waveform.samples)).samples
    for first in range(0, len(longest), rows.piece_samples):
        piece = longest[first : first + rows.piece_samples]
        codes = rows.encode(dict.fromkeys(range(one.num_rows), piece))
        if any(not np.array_equal(codes[0], codes[row]) for row in range(one.num_rows)):
            return False
    return True


def _time(one: Setting, mimi: MimiEncoder, waveforms: Sequence[Waveform]) -> None:
    stage = make_stage(one, mimi)
    begun = time.perf_counter()
    encode(stage, waveforms)  # ends with the codes on this side, so there is nothing to wait for
    one.wall_seconds.append(time.perf_counter() - begun)


def _as_json(one: Setting, config: MimiConfig, machine: Machine, audio_seconds: float) -> dict[str, Any]:
    wall = median(one.wall_seconds)
    cost = encode_cost(config, seconds=audio_seconds, itemsize=2 if one.precision == "bfloat16" else 4)
    return {
        "precision": one.precision,
        "rows": one.num_rows,
        "piece_frames": one.piece_frames,
        "rtfx": round(audio_seconds / wall, 2),
        "wall_seconds": [round(seconds, 4) for seconds in one.wall_seconds],
        "spread": round((max(one.wall_seconds) - min(one.wall_seconds)) / wall, 4),
        "surplus": round(one.surplus, 4),
        "of_limit": round(cost.limit_seconds(machine) / wall, 4),
        "peak_mebibytes": None if one.peak_bytes is None else round(one.peak_bytes / 2**20, 1),
        "equal": {name: round(share, 5) for name, share in one.agreement.items()},
        "rows_alike": one.rows_alike,
    }


def _as_cells(row: dict[str, Any]) -> tuple[str, ...]:
    equal: dict[str, float] = row["equal"]
    return (
        row["precision"],
        str(row["rows"]),
        str(row["piece_frames"]),
        f"{row['rtfx']:,.1f}",
        f"{row['spread']:.0%}",
        f"{row['surplus']:.1%}",
        f"{row['of_limit']:.0%}",
        "-" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:,.0f}",
        *(f"{equal[name]:.2%}" if name in equal else "-" for name in ("codebook_1", "codebook_8", "codebook_32")),
        f"{equal['frames']:.2%}",
        "yes" if row["rows_alike"] else "NO",
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of ten, after one to warm up."""
    timings: list[float] = []
    for _ in range(11):
        _finish_work(device)
        begun = time.perf_counter()
        work()
        _finish_work(device)
        timings.append(time.perf_counter() - begun)
    return min(timings[1:])


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--rows", type=_numbers, default=(1, 8), metavar="N,N", help="1: every stream by itself")
    parser.add_argument("--piece-frames", type=_numbers, default=(25, 125), metavar="N,N")
    parser.add_argument("--precision", type=_precisions, default=("float32",), metavar="P,P", help="a CPU has no tf32")
    parser.add_argument("--mix", choices=MIXES, default="librispeech")
    parser.add_argument("--clips", type=int, help="default: 8 per row of the largest setting")
    parser.add_argument("--seconds", type=float, help="cut clips to this length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--decoder-rtfx", type=float, metavar="X", help="of the decoder, all frames counted: the ratio")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _precisions(text: str) -> tuple[Precision, ...]:
    unknown = set(text.split(",")) - set(_PRECISIONS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; known are {', '.join(_PRECISIONS)}")
    return tuple(precision for precision in _PRECISIONS if precision in text.split(","))


if __name__ == "__main__":
    main()
