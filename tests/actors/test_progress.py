import asyncio
import io
import logging

import pytest
from rich.console import Console

from actors.driver import Progress
from actors.lane import LaneReport, ShardReport
from actors.progress import show

SHARD = ShardReport(shard_id="s", num_finished=3, errors={"TRUNCATED": 1}, example="x", audio_seconds=30.0)
REPORT = LaneReport(has_room=True, occupancy=0.75, shards=(SHARD,))


def test_totals_are_what_is_committed_and_what_the_lanes_hold() -> None:
    progress = Progress(num_inputs=10, num_committed=4, num_errors=1, audio_seconds=100.0, lanes={0: REPORT, 1: REPORT})
    assert progress.totals() == (10, 3, 160.0)


def watch(console: Console, *, seconds: float) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        progress = Progress(num_inputs=10, num_committed=4, audio_seconds=100.0, lanes={0: REPORT}, num_lost_lanes=2)
        await show(progress, total_seconds=400.0, console=console, stop=lambda: loop.time() > end)

    asyncio.run(go())


def test_a_terminal_shows_inputs_rate_errors_and_lost_lanes() -> None:
    screen = io.StringIO()
    watch(Console(file=screen, force_terminal=True, width=160, legacy_windows=False), seconds=0.6)
    for part in ("7", "/10 inputs", "2.2 min audio", "RTFx", "1 errors", "2 lanes lost", "slots 75%"):
        assert part in screen.getvalue()


def test_elsewhere_there_is_a_log_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.progress._LOG_EVERY_SECONDS", 0.2)
    with caplog.at_level(logging.INFO):
        watch(Console(file=io.StringIO(), force_terminal=False), seconds=1.2)
    assert any("7/10 inputs" in message for message in caplog.messages)
