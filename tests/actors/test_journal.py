"""Inputs that kill lanes are found, at a bounded price, whatever restarts happen meanwhile."""

import json
import logging
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.journal import Case, Journal
from pipeline.storage import Storage

IDS = [f"{number:04x}" for number in range(2048)]


def journal(folder: Path, config_fingerprint: str = "f") -> Journal:
    return Journal(Storage(), str(folder), config_fingerprint)


def attempt(case: Case, todo: list[str], poison: set[str]) -> bool:
    """One lane's life with the shard; -> whether it came to the end."""
    for group in case.groups(todo):
        if poison & set(group):
            case.died(group if case.is_suspect else (), died=True, detail="X")
            return False
        case.cleared |= frozenset(group)
    return True


@given(
    num_inputs=st.one_of(st.integers(1, 40), st.sampled_from([100, 500, 2048])),
    num_poison=st.integers(0, 4),
    restarts=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_every_poison_is_found_nobody_else_is_blamed_and_the_price_is_bounded(
    tmp_path_factory: pytest.TempPathFactory, num_inputs: int, num_poison: int, restarts: float, seed: int
) -> None:
    rng = random.Random(seed)
    ids = IDS[:num_inputs]
    poison = set(rng.sample(ids, min(num_poison, num_inputs)))
    book = journal(tmp_path_factory.mktemp("journal"))
    case = Case("s")
    while True:
        convicted = {culprit.source_id for culprit in case.culprits}
        if attempt(case, [id for id in ids if id not in convicted], poison):
            break
        book.write(case)
        if rng.random() < restarts:  # of the driver
            case = book.read()["s"]
    assert {culprit.source_id for culprit in case.culprits} == poison
    assert case.deaths <= (2 + 2 * len(poison) if poison else 0)


@given(count=st.integers(1, 2048), suspects=st.sets(st.sampled_from(IDS)), cleared=st.sets(st.sampled_from(IDS)))
def test_groups_hold_every_input_once(count: int, suspects: set[str], cleared: set[str]) -> None:
    case = Case("s", deaths=2, suspects=frozenset(suspects), cleared=frozenset(cleared))
    done = [id for group in case.groups(IDS[:count]) for id in group]
    assert sorted(done) == IDS[:count]


def test_a_shard_that_lost_no_lanes_is_done_all_at_once() -> None:
    assert Case("s", deaths=1).groups(IDS) == [tuple(IDS)]


def test_of_2048_inputs_one_that_kills_costs_two_lanes_to_find() -> None:
    for place in (0, 1000, 2047):
        case = Case("s", deaths=2)
        while not case.culprits:
            attempt(case, IDS, {IDS[place]})
        assert case.deaths == 4


def test_a_death_that_tells_nothing_new_says_so() -> None:
    case = Case("s", deaths=2, suspects=frozenset(IDS[:3]))
    assert not case.died((), died=True, detail="X")
    assert not case.died(IDS[:2], died=True, detail="X")
    assert case.died(IDS[:4], died=True, detail="X")
    assert case.died(IDS[:1], died=False, detail="X")
    assert [culprit.code for culprit in case.culprits] == ["MODEL_ERROR"]


def test_other_settings_begin_with_a_clean_sheet(tmp_path: Path) -> None:
    journal(tmp_path).write(Case("s", deaths=3))
    assert journal(tmp_path).read()["s"].deaths == 3
    assert journal(tmp_path, "other").read() == {}


def test_asked_to_retry_a_culprit_gets_another_chance(tmp_path: Path) -> None:
    case = Case("s", deaths=2)
    case.died(["a"], died=True, detail="X")
    case.died(["b"], died=False, detail="X")
    journal(tmp_path).write(case)
    [left] = journal(tmp_path).read(acquitted=["WORKER_CRASHED"])["s"].culprits
    assert left.source_id == "b"
    assert journal(tmp_path).read()["s"].culprits == case.culprits


def test_a_committed_shard_leaves_only_its_culprits(tmp_path: Path) -> None:
    innocent, guilty = Case("innocent", deaths=2), Case("guilty", deaths=2)
    guilty.died(["a"], died=True, detail="X")
    for case in (innocent, guilty):
        journal(tmp_path).write(case)
        journal(tmp_path).close(case)
    assert journal(tmp_path).read().keys() == {"guilty"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"config_fingerprint": "f", "deaths": "many"})])
def test_a_damaged_record_is_named_and_ends_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "_kikitori" / "journal"
    folder.mkdir(parents=True)
    (folder / "s.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert journal(tmp_path).read() == {}
    assert "s.json cannot be read and is ignored" in caplog.text


def test_before_anything_was_written_there_is_nothing(tmp_path: Path) -> None:
    assert journal(tmp_path / "nowhere").read() == {}
