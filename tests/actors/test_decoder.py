"""When a lane gets its next shard. What the actor does with it is tested through the driver, with real processes."""

from hypothesis import given
from hypothesis import strategies as st

from actors.decoder import OpenShard, has_room
from pipeline.messages import Failure, Shard, Source

SLOTS = st.integers(1, 256)


@given(num_slots=SLOTS, data=st.data())
def test_a_lane_with_a_slot_that_nobody_waits_for_has_room(num_slots: int, data: st.DataObject) -> None:
    num_seated = data.draw(st.integers(0, num_slots - 1))
    hours_of_work = data.draw(st.floats(0, 1e6))
    assert has_room(num_open=num_seated, num_seated=num_seated, num_slots=num_slots, waiting_seconds=hours_of_work)


@given(num_slots=SLOTS, waiting=st.integers(0, 1000))
def test_a_full_lane_queues_at_most_a_quarter_of_its_slots(num_slots: int, waiting: int) -> None:
    room = has_room(num_open=num_slots + waiting, num_seated=num_slots, num_slots=num_slots, waiting_seconds=0)
    assert room == (waiting < num_slots / 4)


@given(num_slots=SLOTS)
def test_a_full_lane_with_hours_to_go_takes_nothing_that_another_lane_could_do(num_slots: int) -> None:
    assert not has_room(num_open=num_slots, num_seated=num_slots, num_slots=num_slots, waiting_seconds=3600)


def test_a_shard_counts_from_the_moment_it_is_handed_over() -> None:
    """Else the driver, asking again at once, would be told of room that is already given away."""
    sources = tuple(Source(id=str(index), uri=f"/x/{index}") for index in range(3))
    work = OpenShard(Shard(id="s", sources=sources, estimated_seconds=30.0))
    assert (work.num_open, work.remaining_seconds()) == (3, 30.0)
    work.results.append(Failure(source=sources[0], stage="load", code="NOT_FOUND", message=""))
    assert work.num_open == 2
