"""The engine alone, over slots and look-ahead, with the roofline beside it.

    python -m benchmarks.engine --shape 2.6b --slots 32,64,128 --lookahead 1,2,4,8 --mix librispeech
    python -m benchmarks.engine --shape 2.6b --slots 64 --lookahead 1 --profile

A pass is bound by reading weights, keys and values once, and by arithmetic where many positions share that reading.
Random weights of the true shape; needs torch, safetensors, sentencepiece and numpy, and nothing else.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.anatomy import dissect
from models.decoder import Decoder
from models.packing import pack
from models.roofline import num_parameters
from models.shapes import SHAPES, Shape, random_decoder
from models.slots import Slots
from pipeline.speed import Point, probe, sweep
from pipeline.workload import MIXES, make_workload, random_clips

_HEADINGS = ("slots", "K", "RTFx", "step RTFx", "spread", "tok/pass", "busy", "ms/pass", "limit ms", "of limit")
_GRAPHS = {"auto": None, "on": True, "off": False}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What else to say beside the figures, the figures, and both as rows of a table.
_Found = tuple[dict[str, Any], dict[str, Any], list[tuple[str, ...]]]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    device = torch.device(options.device)
    dtype = _DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    shape = SHAPES[options.shape]
    decoder = pack(random_decoder(shape.decoder, device=device, dtype=dtype))
    facts = {
        "shape": options.shape,
        "parameters": num_parameters(shape.decoder),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "graphs": device.type == "cuda" and options.graphs != "off",
        "kernels": device.type == "cuda" and find_spec("triton") is not None,
    }
    measure = _profile if options.profile else _sweep
    found, figures, rows = measure(options, shape, decoder)
    print(", ".join(f"{name} {value}" for name, value in (facts | found).items()))
    print(table(rows))
    print(json.dumps(facts | found | figures))


def _sweep(options: argparse.Namespace, shape: Shape, decoder: Decoder) -> _Found:
    workload = make_workload(
        options.mix,
        num_clips=options.clips or 3 * max(options.slots),
        speech=shape.speech,
        frame_rate_hz=shape.mimi.frame_rate_hz,
        longest_seconds=options.seconds,
    )
    clips = random_clips(workload, mimi=shape.mimi)
    machine = probe(decoder.config, device=decoder.device, dtype=decoder.dtype)
    points = sweep(
        decoder,
        clips,
        num_slots=options.slots,
        lookaheads=options.lookahead,
        repeats=options.repeats,
        padding_id=shape.speech.padding_id,
        machine=machine,
        use_graphs=_GRAPHS[options.graphs],
        on_ride=lambda slots, lookahead: print(f"{slots} slots, look-ahead {lookahead}", file=sys.stderr),
    )
    facts = {
        "gigabytes_per_second": round(machine.bytes_per_second / 1e9, 2),
        "gigaflops_per_second": round(machine.flops_per_second / 1e9, 1),
        "mix": options.mix,
        "clips": len(clips.codes),
        "credited_seconds": round(clips.credited_seconds, 2),
        "step_seconds": round(clips.step_seconds, 2),
    }
    return facts, {"engine": [point.as_json() for point in points]}, [_HEADINGS, *map(_row, points)]


def _profile(options: argparse.Namespace, shape: Shape, decoder: Decoder) -> _Found:
    (num_slots,), (lookahead,) = options.slots, options.lookahead
    slots = Slots(
        decoder,
        num_slots,
        lookahead=lookahead,
        padding_id=shape.speech.padding_id,
        use_graphs=_GRAPHS[options.graphs],
    )
    anatomy = dissect(
        slots,
        num_codebooks=shape.mimi.num_codebooks,
        codebook_size=shape.mimi.codebook_size,
        device=decoder.device,
    )
    return {"slots": num_slots, "lookahead": lookahead}, {"profile": anatomy.as_json()}, anatomy.rows()


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a table of Markdown, the first its head; plain text, for a machine without libraries for tables."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(point: Point) -> tuple[str, ...]:
    return (
        str(point.num_slots),
        str(point.lookahead),
        f"{point.rtfx:,.1f}",
        f"{point.step_rtfx:,.1f}",
        f"{point.spread:.0%}",
        f"{point.gained:.2f}",
        f"{point.occupancy:.0%}",
        f"{1e3 * point.pass_seconds:.2f}",
        f"{1e3 * point.limit_seconds:.2f}",
        f"{point.limit_seconds / point.pass_seconds:.0%} {point.cost.bound(point.machine)}",
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--slots", type=_numbers, default=(8, 16, 32), metavar="N,N")
    parser.add_argument("--lookahead", type=_numbers, default=(1, 2, 4, 8), metavar="K,K")
    parser.add_argument("--mix", choices=MIXES, default="librispeech")
    parser.add_argument("--clips", type=int, help="default: 3 per slot of the largest setting")
    parser.add_argument("--seconds", type=float, help="cut clips to this length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--graphs", choices=_GRAPHS, default="auto", help="replay a recorded pass; auto: on a GPU")
    parser.add_argument("--profile", action="store_true", help="say where a pass of one setting spends its time")
    options = parser.parse_args(arguments)
    if options.graphs == "on" and torch.device(options.device).type != "cuda":
        parser.error(f"--graphs on: there are no CUDA graphs on {options.device}")
    if options.profile and len(options.slots) * len(options.lookahead) > 1:
        parser.error("--profile is for one setting: give --slots and --lookahead one number each")
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
