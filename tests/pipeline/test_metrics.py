import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import Rate, format_hours


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    rtfx=st.floats(0.1, 5000),
    steps=st.lists(st.floats(0.1, 100), min_size=1, max_size=50),
    hours_left=st.floats(0, 100),
)
def test_a_steady_pace_is_seen_by_both_rates(rtfx: float, steps: list[float], hours_left: float) -> None:
    clock, done = Clock(), 0.0
    rate = Rate(total_seconds=sum(steps) * rtfx + hours_left * 3600, clock=clock)
    for step in steps:
        clock.now += step
        done += step * rtfx
        rate.update(done)
    assert rate.recent == pytest.approx(rtfx)
    assert rate.lifetime == pytest.approx(rtfx)
    assert rate.eta_seconds == pytest.approx(hours_left * 3600 / rtfx, abs=1e-6)


def test_a_stall_shows_in_the_recent_rate_after_a_minute() -> None:
    clock = Clock()
    rate = Rate(total_seconds=2000, clock=clock)
    clock.now += 10
    rate.update(1000)
    for _ in range(70):
        clock.now += 1
        rate.update(1000)
    assert rate.recent == 0
    assert rate.eta_seconds is None
    assert rate.lifetime == pytest.approx(1000 / 80)


def test_the_recent_rate_forgets_a_slow_beginning() -> None:
    clock = Clock()
    rate = Rate(total_seconds=100_000, clock=clock)
    clock.now += 600  # Ray and the models start
    rate.update(0)
    for second in range(1, 121):
        clock.now += 1
        rate.update(50 * second)
    assert rate.recent == pytest.approx(50)
    assert rate.lifetime == pytest.approx(50 * 120 / 720)


def test_before_anything_is_done_there_is_no_rate_and_no_end() -> None:
    clock = Clock()
    rate = Rate(total_seconds=100, clock=clock)
    assert (rate.recent, rate.lifetime, rate.eta_seconds) == (0, 0, None)
    assert rate.update(0).eta_seconds is None


def test_more_audio_than_was_estimated_is_not_a_negative_time_to_go() -> None:
    clock = Clock()
    rate = Rate(total_seconds=10, clock=clock)
    clock.now += 1
    assert rate.update(25).eta_seconds == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (48.4, "48 s"),
        (59.4, "59 s"),
        (59.7, "1.0 min"),
        (750, "12.5 min"),
        (3599, "1.0 h"),
        (4_000_000, "1,111.1 h"),
    ],
)
def test_hours_are_written_in_the_unit_people_would_say(seconds: float, text: str) -> None:
    assert format_hours(seconds) == text
