import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.known_ids
from pipeline.known_ids import KnownIds


def make_ids(numbers: range) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in numbers]


# Ids that share their upper or lower half, as hashes hardly ever do.
IDS = st.builds(
    lambda upper, lower: f"{upper:016x}{lower:016x}", st.integers(0, 3), st.integers(0, 2**64 - 1) | st.integers(0, 3)
)


@given(batches=st.lists(st.lists(IDS, max_size=20), max_size=6), asked=st.lists(IDS, max_size=30))
def test_it_holds_what_was_added_and_nothing_else(batches: list[list[str]], asked: list[str]) -> None:
    known, expected = KnownIds(), set[str]()
    for batch in batches:
        new = sorted(set(batch) - expected)
        known.add(new)
        expected |= set(new)
    assert len(known) == len(expected)
    asked += random.Random(0).sample(sorted(expected), len(expected))
    assert known.holds(asked).tolist() == [id in expected for id in asked]


@pytest.mark.parametrize("max_merged", [1, 100, 10**6])
def test_runs_are_few_and_short_however_it_was_filled(monkeypatch: pytest.MonkeyPatch, max_merged: int) -> None:
    monkeypatch.setattr(pipeline.known_ids, "_MAX_MERGED", max_merged)
    known = KnownIds()
    for start in range(0, 1000, 10):
        known.add(make_ids(range(start, start + 10)))
    assert known.holds(make_ids(range(1100))).tolist() == [True] * 1000 + [False] * 100
    assert max(len(upper) for upper, _ in known._runs) <= max(10, 2 * max_merged)
    assert len(known._runs) <= 10 + 1000 / (max_merged / 2)


def test_an_id_is_not_taken_for_one_with_the_same_half() -> None:
    known = KnownIds()
    known.add(["0" * 31 + "1", "0" * 31 + "2"])
    assert known.holds(["0" * 32, "0" * 31 + "2", "1" + "0" * 30 + "1"]).tolist() == [False, True, False]


def test_nothing_is_known_of_nothing() -> None:
    known = KnownIds()
    known.add([])
    assert (len(known), known.holds([]).tolist()) == (0, [])
    np.testing.assert_array_equal(known.holds(["0" * 32]), [False])


@pytest.mark.parametrize("id", ["0" * 31, "g" * 32, "A" * 32])
def test_what_is_no_id_is_our_mistake(id: str) -> None:
    with pytest.raises(AssertionError):
        KnownIds().add([id])
