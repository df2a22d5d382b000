"""Drawn tokens follow the softmax, and are a function of stream, step and seed alone."""

import math

import pytest
import torch
from torch import Tensor

from models.sampling import choose, gumbel

NUM_DRAWS = 20_000


def draws(logits_V: Tensor, *, temperature: float, top_k: int | None = None, seed: int = 1) -> Tensor:
    """Twenty thousand steps of one stream."""
    steps = torch.arange(NUM_DRAWS)
    ids, _ = choose(
        logits_V.expand(NUM_DRAWS, -1),
        temperature=temperature,
        top_k=top_k,
        seed=torch.full_like(steps, seed),
        step=steps,
    )
    return ids


def chi_square(ids: Tensor, probability_V: Tensor) -> float:
    expected = probability_V * len(ids)
    seen = torch.bincount(ids, minlength=len(probability_V))
    return float(((seen - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_draws_follow_the_softmax(temperature: float, seed: int) -> None:
    """Chi-square with 9 degrees of freedom: above 45 once in a million correct samplers. The draws never change."""
    logits = torch.tensor([0.0, 0.2, -0.3, 1.0, 0.5, 0.1, -0.5, 0.7, -0.1, 0.4])
    ids = draws(logits, temperature=temperature, seed=seed)
    assert chi_square(ids, (logits / temperature).softmax(-1)) < 45


def test_draws_over_streams_follow_the_softmax_too() -> None:
    """As above, over the first step of twenty thousand streams."""
    logits, seeds = torch.linspace(-1, 1, 10), torch.arange(NUM_DRAWS) * 977
    ids, _ = choose(logits.expand(NUM_DRAWS, -1), temperature=1.0, top_k=None, seed=seeds, step=torch.zeros_like(seeds))
    assert chi_square(ids, logits.softmax(-1)) < 45


def test_successive_draws_are_independent() -> None:
    """Chi-square of pairs over a fair four-sided die, 15 degrees of freedom: above 56 once in a million."""
    ids = draws(torch.zeros(4), temperature=1.0)
    pairs = ids[0::2] * 4 + ids[1::2]
    assert chi_square(pairs, torch.full((16,), 1 / 16)) < 56


def test_only_the_top_k_are_drawn() -> None:
    """And those by their own softmax: 2 degrees of freedom, above 28 once in a million."""
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 2.5])
    ids = draws(logits, temperature=2.0, top_k=3)
    assert set(ids.tolist()) == {0, 3, 5}
    kept = torch.tensor([1.0, 3.0, 2.5])
    order = torch.tensor([0, -1, -1, 1, -1, 2])
    assert chi_square(order[ids], (kept / 2).softmax(-1)) < 28


def test_top_k_of_one_or_of_everything() -> None:
    logits = torch.randn(50)
    assert set(draws(logits, temperature=5.0, top_k=1).tolist()) == {int(logits.argmax())}
    assert torch.equal(draws(logits, temperature=1.0, top_k=50), draws(logits, temperature=1.0))
    assert torch.equal(draws(logits, temperature=1.0, top_k=99), draws(logits, temperature=1.0))


def test_a_stream_is_drawn_alike_in_any_row_of_any_batch() -> None:
    logits, seeds, steps = torch.randn(40, 30), torch.arange(40) * 12345, torch.arange(40) % 7
    together, _ = choose(logits, temperature=1.3, top_k=9, seed=seeds, step=steps)
    order = torch.randperm(40)
    shuffled, _ = choose(logits[order], temperature=1.3, top_k=9, seed=seeds[order], step=steps[order])
    assert torch.equal(shuffled, together[order])
    for row in range(40):
        one = slice(row, row + 1)
        alone, _ = choose(logits[one], temperature=1.3, top_k=9, seed=seeds[one], step=steps[one])
        assert alone == together[row]


def test_streams_and_steps_differ() -> None:
    """A fair coin in 64 tosses: two streams toss alike with odds of 2**-64."""
    ids = [draws(torch.zeros(2), temperature=1.0, seed=seed)[:64] for seed in (0, 1, 2)]
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[1], ids[2])
    assert not torch.equal(ids[0][:32], ids[0][32:])


def test_greedy_takes_the_best_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-2.0, -3.0, -1.0, -1.0]])
    nothing = torch.zeros(3, dtype=torch.int64)
    ids, logprobs = choose(logits, temperature=0.0, top_k=1, seed=nothing, step=nothing)
    assert ids.tolist() == [1, 0, 2]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_log_probabilities_are_those_of_the_plain_softmax(temperature: float) -> None:
    """Confidence means the same at any temperature."""
    logits, seeds = torch.randn(20, 8), torch.arange(20)
    ids, logprobs = choose(logits, temperature=temperature, top_k=4, seed=seeds, step=seeds)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(20), ids])


def test_the_noise_is_finite_and_of_its_distribution() -> None:
    noise = gumbel(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 500)
    assert noise.isfinite().all()
    # Mean 0.57722 and variance pi**2 / 6, within five standard errors of half a million numbers.
    assert float(noise.mean()) == pytest.approx(0.57722, abs=5 * 1.2825 / 500_000**0.5)
    assert float(noise.var()) == pytest.approx(1.64493, abs=5 * 3.4 / 500_000**0.5)


def splitmix64(x: int) -> int:
    """The finaliser of Steele, Lea and Flood (2014), on Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 5), (2**62, 100), (2**63 - 1, 40_000)])
def test_the_noise_stays_what_it_is(seed: int, step: int) -> None:
    """Sampled transcripts are reproduced by later versions only while this arithmetic does not change."""
    golden = 0x9E3779B97F4A7C15
    of_step = splitmix64((seed + step * golden) % 2**64)
    bits = [splitmix64((of_step + token * golden) % 2**64) % 2**23 for token in range(20)]
    expected = [-math.log(-math.log((value + 0.5) / 2**23)) for value in bits]
    noise = gumbel(torch.tensor([seed]), torch.tensor([step]), 20)[0]
    # Two float32 logarithms.
    assert noise.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
