"""A sample of what `python -m benchmarks.hostile` does at length, and that it sees what it must see."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from benchmarks import hostile as runner
from benchmarks.hostile import Outcome, run, summarise
from tests.hostile import Hostile, hostile


def test_hostile_inputs_end_in_their_samples_or_in_a_typed_error() -> None:
    outcomes = list(run(range(250)))
    assert [outcome.seed for outcome in outcomes] == list(range(250))
    assert not [(outcome.name, outcome.problem) for outcome in outcomes if outcome.problem]
    assert {"ok", "TRUNCATED", "DECODE_FAILED", "UNSUPPORTED_FORMAT", "EMPTY_AUDIO"} <= {o.code for o in outcomes}


def test_an_input_follows_from_its_seed() -> None:
    assert hostile(7).data == hostile(7).data
    assert hostile(7).data != hostile(8).data


def lethal(seed: int) -> Hostile:
    """To the process that loads it, two of them are."""
    is_child = multiprocessing.parent_process() is not None
    if is_child and seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while is_child and seed == 4:
        time.sleep(1)
    return hostile(seed)


def test_an_input_that_kills_or_hangs_its_process_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_LIMIT_SECONDS", 8.0)
    outcomes = list(run(range(6), lethal))
    assert {outcome.seed: outcome.problem for outcome in outcomes if outcome.problem} == {2: "died", 4: "hung"}
    assert len(outcomes) == 6


OK = Outcome(
    seed=1,
    name="1",
    kind="few bits flipped",
    format="wav",
    code="ok",
    true_seconds=6.0,
    seconds=6.0,
    num_samples=144_000,
)


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (OK, None),
        (replace(OK, seconds=5.4), "short"),
        (replace(OK, num_samples=0), "ok without a sample"),
        (replace(OK, code="TRUNCATED", seconds=None), None),
        (replace(OK, code="DECODE_FAILED", message="KeyError while decoding; please report it"), "accident"),
    ],
)
def test_what_must_not_be_is_counted(outcome: Outcome, problem: str | None) -> None:
    assert outcome.problem == problem
    assert summarise([outcome])["problems"] == ({problem: 1} if problem else {})
