"""A run's progress for people: one live line on a terminal, one log line every ten seconds elsewhere."""

import asyncio
import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from actors.driver import Progress as RunProgress
from pipeline.metrics import Rate, format_hours

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 0.5
_LOG_EVERY_SECONDS = 10.0


async def show(progress: RunProgress, *, total_seconds: float, console: Console, stop: Callable[[], bool]) -> None:
    """Refresh until `stop()`; `total_seconds` is the plan's estimate of the audio to do."""
    rate = Rate(total_seconds=total_seconds)
    if console.is_terminal:
        await _live(progress, rate, console, stop)
    else:
        await _log(progress, rate, stop)


async def _live(progress: RunProgress, rate: Rate, console: Console, stop: Callable[[], bool]) -> None:
    bar = Progress(
        TextColumn("[bold]{task.completed:.0f}[/]/{task.total:.0f} inputs"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("run", total=progress.num_inputs, completed=0, detail="starting")
        while not stop():
            done, errors, seconds = progress.totals()
            bar.update(task, completed=done, detail=_describe(progress, rate.update(seconds), errors, seconds))
            await asyncio.sleep(_REFRESH_SECONDS)


async def _log(progress: RunProgress, rate: Rate, stop: Callable[[], bool]) -> None:
    next_line = time.monotonic() + _LOG_EVERY_SECONDS
    while not stop():
        done, errors, seconds = progress.totals()
        rate.update(seconds)
        if time.monotonic() >= next_line:
            next_line += _LOG_EVERY_SECONDS
            logger.info("%d/%d inputs, %s", done, progress.num_inputs, _describe(progress, rate, errors, seconds))
        await asyncio.sleep(_REFRESH_SECONDS)


def _describe(progress: RunProgress, rate: Rate, errors: int, seconds: float) -> str:
    parts = [f"{format_hours(seconds)} audio", f"RTFx {rate.recent:.0f}"]
    if rate.eta_seconds is not None:
        parts.append(f"ETA {rate.eta_seconds:.0f} s")
    if errors:
        parts.append(f"{errors} errors")
    if progress.num_lost_lanes:
        parts.append(f"{progress.num_lost_lanes} lanes lost")
    if progress.lanes:
        busy = sum(report.occupancy for report in progress.lanes.values()) / len(progress.lanes)
        parts.append(f"slots {busy:.0%}")
    return ", ".join(parts)
