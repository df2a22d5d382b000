"""The bare engine's loop gives the tokens of the stage, and its counts add up; nothing here depends on the clock."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.decoder import Decoder
from models.roofline import Machine, PassCost
from models.shapes import SHAPES, random_decoder
from models.slots import Slots
from pipeline.speed import Point, Ride, probe, ride, sweep
from pipeline.workload import Clips
from tests.streams import generate_alone

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
MACHINE = Machine(bytes_per_second=1e9, flops_per_second=1e9)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(TINY.decoder)


@pytest.fixture(scope="module")
def codes() -> tuple[NDArray[np.int16], ...]:
    """Short ones, one longer than what is fed at once, and one of no frame."""
    rng = np.random.default_rng(0)
    return tuple(rng.integers(64, size=(8, num), dtype=np.int16) for num in (5, 300, 0, 40, 41, 17, 1))


@pytest.mark.parametrize("lookahead", [1, 3, 8])
@pytest.mark.parametrize("num_slots", [1, 3, 10])
def test_tokens_are_those_of_the_stage(
    decoder: Decoder, codes: tuple[NDArray[np.int16], ...], num_slots: int, lookahead: int
) -> None:
    slots = Slots(decoder, num_slots, lookahead=lookahead, padding_id=3)
    taken, tokens = ride(slots, codes, device=CPU, context=16)
    expected = [generate_alone(decoder, TINY.speech, clip) for clip in codes]
    assert [ids.tolist() for ids in tokens] == expected
    assert taken.positions == sum(map(len, expected))


def test_counts_without_look_ahead(decoder: Decoder, codes: tuple[NDArray[np.int16], ...]) -> None:
    """One position per slot and pass, so nothing is lost and nothing gained."""
    taken, _ = ride(Slots(decoder, 2), codes, device=CPU, context=16)
    assert taken.slot_passes == taken.positions
    assert taken.positions / 2 <= taken.passes <= taken.positions
    assert 0 < taken.mean_context <= 16


def test_one_point_for_every_setting(decoder: Decoder, codes: tuple[NDArray[np.int16], ...]) -> None:
    clips = Clips(name="test", codes=codes, credited_seconds=20.0, frame_rate_hz=12.5)
    seen: list[tuple[int, int]] = []
    points = sweep(
        decoder,
        clips,
        num_slots=(2, 3),
        lookaheads=(1, 2),
        repeats=2,
        padding_id=3,
        machine=MACHINE,
        on_ride=lambda slots, lookahead: seen.append((slots, lookahead)),
    )
    settings = [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert [(point.num_slots, point.lookahead) for point in points] == settings
    assert seen == settings * 2, "repeats go round the settings, not one setting after the other"
    for point in points:
        assert len(point.rides) == 2
        assert point.step_rtfx / point.rtfx == pytest.approx(point.step_seconds / 20.0)
        assert 0 < point.occupancy <= 1
        assert 1 <= point.gained <= point.lookahead


def test_the_figures_of_a_point() -> None:
    rides = tuple(
        Ride(wall_seconds=wall, passes=100, slot_passes=150, positions=300, mean_context=8) for wall in (1.0, 2.0, 4.0)
    )
    cost = PassCost(weight_bytes=10**7, cache_bytes=0, flops=1e6)
    point = Point(
        num_slots=2, lookahead=4, rides=rides, credited_seconds=10, step_seconds=16, cost=cost, machine=MACHINE
    )
    assert (point.rtfx, point.step_rtfx, point.spread) == (5, 8, 1.5)
    assert (point.gained, point.occupancy, point.pass_seconds) == (2, 0.75, 0.02)
    row = point.as_json()
    assert row["of_limit"] == pytest.approx(cost.limit_seconds(MACHINE) / 0.02, abs=1e-4)
    assert row["bound"] == "memory"


def test_the_machine_is_measured() -> None:
    machine = probe(TINY.decoder, device=CPU, dtype=torch.float32)
    assert 1e8 < machine.bytes_per_second < 1e13
    assert 1e7 < machine.flops_per_second < 1e16
    assert math.isfinite(machine.flops_per_second)
