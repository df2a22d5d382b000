"""Counts against numbers worked out by hand, and against the modules themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.decoder import Decoder
from models.roofline import EncodeCost, Machine, PassCost, encode_cost, num_parameters, num_parameters_read, pass_cost
from models.shapes import SHAPES, random_decoder, random_mimi

LARGE = SHAPES["2.6b"].decoder


def test_the_released_2_6b() -> None:
    """2,617,118,720 values follow from the size of the published file (dossier, section 2)."""
    assert num_parameters(LARGE) == 2_617_118_720
    text_table, audio_tables = 4001 * 2048, 32 * 2049 * 2048
    assert num_parameters_read(LARGE) == 2_617_118_720 - text_table - audio_tables == 2_474_641_408


def test_the_released_1b() -> None:
    assert num_parameters(SHAPES["1b"].decoder) == 989_204_480


@pytest.mark.parametrize("name", ["60m", "tiny"])
def test_counted_is_what_the_module_holds(name: str) -> None:
    decoder = random_decoder(SHAPES[name].decoder)
    held = sum(parameter.numel() for parameter in decoder.parameters())
    tables = decoder.text_embedding.weight.numel() + decoder.audio_embedding.weight.numel()
    assert num_parameters(decoder.config) == held
    assert num_parameters_read(decoder.config) == held - tables
    assert isinstance(decoder, Decoder)


def test_bytes_of_a_pass_by_hand() -> None:
    """2.6B in bfloat16, 32 streams of half a minute: 5 GB of weights, and 147 MB of keys and values for each stream."""
    cost = pass_cost(LARGE, num_slots=32, num_positions=1, filled_context=374, itemsize=2)
    assert cost.weight_bytes == 2 * 2_474_641_408
    assert cost.cache_bytes == 32 * 375 * (2 * 48 * 2048 * 2) == 32 * 147_456_000
    assert cost.num_bytes == cost.weight_bytes + cost.cache_bytes


def test_operations_of_a_pass_by_hand() -> None:
    """Two per weight and position; four per channel, key and layer; the first position sees itself alone."""
    products = 48 * (4 * 2048**2 + 3 * 2048 * 5632) + 2048 * 4000
    cost = pass_cost(LARGE, num_slots=3, num_positions=4, filled_context=0, itemsize=2)
    assert cost.flops == 3 * 4 * (2 * products + 4 * 48 * 2048)


def test_look_ahead_costs_operations_and_hardly_any_bytes() -> None:
    one, eight = (pass_cost(LARGE, num_slots=32, num_positions=num, filled_context=375, itemsize=2) for num in (1, 8))
    assert eight.flops == 8 * one.flops
    assert eight.num_bytes < 1.01 * one.num_bytes


def test_the_slower_of_two_is_the_limit() -> None:
    cost = PassCost(weight_bytes=60, cache_bytes=40, flops=1000)
    by_memory, by_arithmetic = (Machine(bytes_per_second=10, flops_per_second=flops) for flops in (1000, 10))
    assert (cost.limit_seconds(by_memory), cost.bound(by_memory)) == (10, "memory")
    assert (cost.limit_seconds(by_arithmetic), cost.bound(by_arithmetic)) == (100, "compute")


@pytest.mark.parametrize("name", ["60m", "tiny"])
def test_operations_of_encoding_are_those_that_torch_counts(name: str) -> None:
    """Over ten seconds, to the last one; attention's and those of the distances torch does not count."""
    config = SHAPES[name].mimi
    mimi = random_mimi(config)
    with FlopCounterMode(display=False) as counter:
        mimi.encode(torch.zeros(1, 240_000))
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 250 * config.num_layers * 4 * config.dim * config.context
    distances = 125 * 2 * config.num_codebooks * config.codebook_size * config.codebook_dim
    assert counted == encode_cost(config, seconds=10, itemsize=4).flops - attention - distances


def test_bytes_of_encoding_by_hand() -> None:
    """The released codec's first convolution writes 64 channels at 24 kHz, 6.1 MB a second; the next ones too."""
    cost = encode_cost(SHAPES["2.6b"].mimi, seconds=1, itemsize=4)
    first, rest = 24_000 * (1 + 64), 24_000 * (64 + 32 + 32 + 64 + 64) + 6_000 * 128
    assert cost.num_bytes / 4 > first + rest
    assert encode_cost(SHAPES["2.6b"].mimi, seconds=3, itemsize=2).num_bytes == 1.5 * cost.num_bytes


def test_the_slower_of_two_is_the_encoders_limit() -> None:
    cost = EncodeCost(num_bytes=100, flops=1000)
    assert cost.limit_seconds(Machine(bytes_per_second=10, flops_per_second=1000)) == 10
    assert cost.limit_seconds(Machine(bytes_per_second=10, flops_per_second=10)) == 100
