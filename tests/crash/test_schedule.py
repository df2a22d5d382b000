"""A seed is a schedule; what it draws can happen and does not cost an input its row by design."""

from pipeline.failpoints import PLACES, parse
from tests.crash.schedule import schedule_of

SCHEDULES = [schedule_of(seed, list(PLACES), with_s3=True) for seed in range(2000)]


def test_the_same_seed_is_the_same_schedule() -> None:
    assert [schedule_of(seed, list(PLACES), with_s3=True) for seed in range(20)] == SCHEDULES[:20]
    assert len({str(schedule) for schedule in SCHEDULES}) == len(SCHEDULES)


def test_all_places_stories_and_victims_are_drawn() -> None:
    attempts = [attempt for schedule in SCHEDULES for attempt in schedule.attempts]
    orders = [order for attempt in attempts for order in parse(attempt.failpoints)]
    assert {order.place for order in orders} == set(PLACES)
    assert {order.action for order in orders} == {"kill", "pause", "raise", "full", "sleep"}
    assert {schedule.story for schedule in SCHEDULES} == {"fresh", "retry", "new-version", "superseded"}
    victims = {strike.victim for attempt in attempts for strike in attempt.strikes}
    assert victims == {"LoadActor", "EncoderActor", "DecoderActor", "driver", "node"}


def test_nothing_is_raised_where_an_input_would_be_blamed() -> None:
    raised = {
        order.place
        for schedule in SCHEDULES
        for attempt in schedule.attempts
        for order in parse(attempt.failpoints)
        if order.action == "raise"
    }
    assert not {place for place in raised if place.startswith("load.")}


def test_s3_faults_are_for_outputs_on_s3() -> None:
    for schedule in SCHEDULES:
        assert schedule.on_s3 or not any(attempt.s3 for attempt in schedule.attempts)
