"""Draws a result of `benchmarks.engine`: RTFx and the roofline's limit against slots, one colour per look-ahead.

    python -m benchmarks.plot benchmarks/results/2026-11-22-cpu-2core-60m-lookahead.json docs/plots/engine-cpu.svg

Takes what the script has printed last, saved as a file, or any JSON that contains it. Nothing is measured here.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 56, 52
# The background is the reader's, light or dark, so every colour is of medium lightness: 3:1 and more against both.
_INK, _GRID = "#7d8590", "#7d859055"
_COLOURS = ("#2f81f7", "#d2691e", "#2da44e", "#bf5fd0", "#d1495b", "#8a8f00", "#1a9ba1", "#8f6fd8")

_Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON with the last line of `python -m benchmarks.engine`")
    parser.add_argument("target", type=Path, help="the SVG to write")
    options = parser.parse_args(arguments)
    facts = find_engine(json.loads(options.result.read_text(encoding="utf-8")))
    if facts is None:
        parser.error(f"{options.result} holds no figures of benchmarks.engine")
    options.target.parent.mkdir(parents=True, exist_ok=True)
    options.target.write_text(draw(facts), encoding="utf-8")


def find_engine(value: Any) -> Mapping[str, Any] | None:
    """The first object, at any depth, whose `engine` is a list of settings."""
    if isinstance(value, dict):
        if isinstance(value.get("engine"), list):
            return value
        return next((found for part in value.values() if (found := find_engine(part)) is not None), None)
    return None


def draw(facts: Mapping[str, Any]) -> str:
    """The whole SVG."""
    rows: list[_Row] = facts["engine"]
    slots = sorted({row["slots"] for row in rows})
    scale = _Scale(slots, max(max(row["rtfx"], _limit(row)) for row in rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(_title(facts))}</title>",
        _text(_LEFT, 22, _title(facts), size=15),
        _text(_LEFT, 41, _subtitle(facts), size=12),
        *_axes(scale),
        *_lines(rows, scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """From slots, evenly spaced as they double, and RTFx to the paper."""

    def __init__(self, slots: Sequence[int], highest: float) -> None:
        self.slots = slots
        self.tick = _round_step(highest / 5)
        self.top = self.tick * math.ceil(highest / self.tick)

    def x(self, slots: float) -> float:
        first, last = math.log(self.slots[0]), math.log(self.slots[-1])
        width = _WIDTH - _LEFT - _RIGHT
        share = (math.log(slots) - first) / (last - first) if last > first else 0.5
        return _LEFT + width * (0.05 + 0.9 * share)

    def y(self, rtfx: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * rtfx / self.top


def _axes(scale: _Scale) -> Iterable[str]:
    for index in range(round(scale.top / scale.tick) + 1):
        value = index * scale.tick
        y = scale.y(value)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>'
        yield _text(_LEFT - 8, y + 4, f"{value:,g}", anchor="end")
    for slots in scale.slots:
        yield _text(scale.x(slots), _HEIGHT - _BOTTOM + 20, str(slots), anchor="middle")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield _text(middle, _HEIGHT - 10, "slots", anchor="middle")
    yield _text(14, _TOP - 6, "RTFx")


def _lines(rows: Sequence[_Row], scale: _Scale) -> Iterable[str]:
    x, y = _WIDTH - _RIGHT + 14, _TOP + 6
    for index, lookahead in enumerate(sorted({row["lookahead"] for row in rows})):
        colour = _COLOURS[index % len(_COLOURS)]
        mine = sorted((row for row in rows if row["lookahead"] == lookahead), key=lambda row: row["slots"])
        yield _line([(scale.x(row["slots"]), scale.y(row["rtfx"])) for row in mine], colour)
        yield _line([(scale.x(row["slots"]), scale.y(_limit(row))) for row in mine], colour, dashes="5 4")
        for row in mine:
            yield f'<circle cx="{scale.x(row["slots"]):.1f}" cy="{scale.y(row["rtfx"]):.1f}" r="4" fill="{colour}"/>'
        yield _line([(x, y + 20 * index), (x + 22, y + 20 * index)], colour)
        yield _text(x + 30, y + 20 * index + 4, f"look-ahead {lookahead}", colour=colour)
    below = y + 20 * len({row["lookahead"] for row in rows}) + 8
    yield _line([(x, below), (x + 22, below)], _INK, dashes="5 4")
    yield _text(x + 30, below + 4, "roofline")


def _limit(row: _Row) -> float:
    """RTFx if every pass took the least time that the machine allows."""
    return row["rtfx"] * row["pass_ms"] / row["limit_ms"]


def _round_step(value: float) -> float:
    """1, 2 or 5 times a power of ten, and not less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def _title(facts: Mapping[str, Any]) -> str:
    return f"Decoder {facts['shape']} on {facts['device']}, {facts['dtype']}, clips of {facts['mix']}"


def _subtitle(facts: Mapping[str, Any]) -> str:
    bus, arithmetic = facts["gigabytes_per_second"], facts["gigaflops_per_second"]
    return f"random weights; {bus:,g} GB/s and {arithmetic:,g} GFLOP/s measured; torch {facts['torch']}"


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashes: str = "none") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, colour: str = _INK) -> str:
    placed = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {placed}>{escape(text)}</text>"


if __name__ == "__main__":
    main()
