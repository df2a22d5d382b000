import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.alarm import Alarm
from actors.lane import ShardReport
from pipeline.errors import SystemFailure


def report(shard_id: str, *, finished: int, errors: int) -> ShardReport:
    counts = {"FETCH_FAILED": errors} if errors else {}
    example = "s3://b/x.wav: access denied" if errors else None
    return ShardReport(shard_id=shard_id, num_finished=finished, errors=counts, example=example, audio_seconds=0.0)


def rings(alarm: Alarm) -> bool:
    try:
        alarm.check()
    except SystemFailure:
        return True
    return False


@given(
    shards=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8),
    num_inputs=st.integers(1, 400),
    rate=st.floats(0, 1),
    settled=st.sets(st.integers(0, 7)),
)
def test_it_rings_when_enough_is_finished_and_too_much_of_it_is_errors(
    shards: list[tuple[int, int]], num_inputs: int, rate: float, settled: set[int]
) -> None:
    """Committed or not, reported once or twice."""
    alarm = Alarm(rate, num_inputs=num_inputs)
    finished = errors = 0
    for index, (good, bad) in enumerate(shards):
        alarm.saw(report(str(index), finished=good, errors=0))
        alarm.saw(report(str(index), finished=good + bad, errors=bad))
        if index in settled:
            alarm.settle(str(index))
            alarm.saw(report(str(index), finished=good + bad, errors=bad))  # was on its way
        finished, errors = finished + good + bad, errors + bad
    assert rings(alarm) == (finished >= min(50, num_inputs) and errors > rate * finished)


def test_it_is_off_unless_asked_for() -> None:
    alarm = Alarm(None, num_inputs=10)
    alarm.saw(report("s", finished=10, errors=10))
    assert not rings(alarm)


def test_a_lost_shard_does_not_count_until_it_is_done_again() -> None:
    alarm = Alarm(0.5, num_inputs=1000)
    alarm.saw(report("s", finished=60, errors=60))
    assert rings(alarm)
    alarm.forget("s")
    assert not rings(alarm)


def test_it_says_what_where_and_what_to_check() -> None:
    alarm = Alarm(0.25, num_inputs=60)
    alarm.saw(report("s", finished=60, errors=58))
    with pytest.raises(SystemFailure) as caught:
        alarm.check()
    said = str(caught.value)
    for part in ("58 of the 60", "0.25", "FETCH_FAILED 58", "s3://b/x.wav: access denied", "credentials"):
        assert part in said
