"""Ring, whole clip and brute force attend to the same keys."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.memory import AttentionSpec, RingCache, WholeClip, Window

NUM_HEADS, HEAD_DIM, CONTEXT = 2, 4, 6
# Softmax-weighted means of numbers of size 1, in another order of summation.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def spec(*, window: Window = "exact", context: int = CONTEXT) -> AttentionSpec:
    return AttentionSpec(
        num_layers=2, num_heads=NUM_HEADS, head_dim=HEAD_DIM, context=context, rope_theta=1e4, window=window
    )


def ring(num_rows: int, *, max_new: int = 1, window: Window = "exact", context: int = CONTEXT) -> RingCache:
    return RingCache(
        spec(window=window, context=context),
        num_rows=num_rows,
        max_new=max_new,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def qkv(num_rows: int, length: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, length, NUM_HEADS, HEAD_DIM, generator=rng) for _ in range(3)]


def call(cache: RingCache, parts: list[Tensor], *, layer: int = 0) -> Tensor:
    cache.begin(parts[0].shape[1])
    return cache.attend(layer, *parts)


def streamed(cache: RingCache, parts: list[Tensor], sizes: Sequence[int]) -> Tensor:
    out = []
    for piece in zip(*(x.split(list(sizes), dim=1) for x in parts), strict=True):
        out.append(call(cache, list(piece)))
        cache.advance(piece[0].shape[1])
    return torch.cat(out, dim=1)


def brute_force(parts: list[Tensor], *, window: Window = "exact", context: int = CONTEXT) -> Tensor:
    """One query at a time over the keys that the window's definition names."""
    q, k, v = parts
    rows = []
    for query in range(q.shape[1]):
        newest = query | 1 if window == "ring" else query
        seen = slice(max(0, newest - context + 1), query + 1)
        weights = torch.einsum("bhe,bkhe->bhk", q[:, query], k[:, seen]) / HEAD_DIM**0.5
        rows.append(torch.einsum("bhk,bkhe->bhe", weights.softmax(-1), v[:, seen]))
    return torch.stack(rows, dim=1)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), context=st.integers(1, 9))
def test_any_cutting_of_the_exact_window_is_brute_force(sizes: list[int], context: int) -> None:
    parts = qkv(2, sum(sizes))
    out = streamed(ring(2, max_new=9, context=context), parts, sizes)
    torch.testing.assert_close(out, brute_force(parts, context=context), **CLOSE)


@given(frames=st.lists(st.integers(1, 4), min_size=1, max_size=8), context=st.integers(2, 9))
def test_any_cutting_of_the_ring_window_is_brute_force(frames: list[int], context: int) -> None:
    sizes = [2 * count for count in frames]
    parts = qkv(2, sum(sizes))
    out = streamed(ring(2, max_new=8, window="ring", context=context), parts, sizes)
    torch.testing.assert_close(out, brute_force(parts, window="ring", context=context), **CLOSE)


@given(length=st.integers(1, 40), context=st.integers(1, 12))
def test_a_whole_clip_is_brute_force(length: int, context: int) -> None:
    parts = qkv(3, length)
    clip = WholeClip(spec(context=context), num_rows=3, length=length, device=torch.device("cpu"))
    torch.testing.assert_close(clip.attend(0, *parts), brute_force(parts, context=context), **CLOSE)


def test_exact_and_ring_differ_only_once_the_window_is_full() -> None:
    parts = qkv(1, 20)
    exact, lossy = brute_force(parts), brute_force(parts, window="ring")
    assert torch.equal(exact[:, : CONTEXT - 1], lossy[:, : CONTEXT - 1])
    differs = (exact - lossy).abs().amax(dim=(0, 2, 3)) > 1e-4
    # Of each pair, the first latent has lost a key and the second has not.
    assert differs[CONTEXT::2].all()
    assert not differs[1::2].any()


def test_positions_are_those_of_the_row() -> None:
    """Rotations follow each row's own position, which never wraps."""
    cache, lone = ring(2), ring(1)
    for count in (3, 50):
        cache.advance(torch.tensor([count, 0]))
        lone.advance(count)
        cache.begin(1)
        lone.begin(1)
        assert torch.equal(cache.cos[:1], lone.cos)
        assert torch.equal(cache.cos[1], torch.ones_like(cache.cos[1]))


@given(active=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_row_that_waits_loses_nothing(active: list[tuple[bool, bool]]) -> None:
    """A call writes keys for every row; those of a row that is not advanced must not count."""
    counts = [sum(row) for row in zip(*active, strict=True)]
    streams = [qkv(1, max(1, count), seed=row) for row, count in enumerate(counts)]
    cache, at, out = ring(2), [0, 0], ([], [])
    for moves in active:
        noise = qkv(2, 1, seed=99)
        for row in (0, 1):
            if moves[row]:
                for part, stream in zip(noise, streams[row], strict=True):
                    part[row] = stream[0, at[row]]
        result = call(cache, noise)
        cache.advance(torch.tensor(moves).long())
        for row in (0, 1):
            if moves[row]:
                out[row].append(result[row])
                at[row] += 1
    for row in (0, 1):
        if out[row]:
            torch.testing.assert_close(torch.cat(out[row])[None], brute_force(streams[row]), **CLOSE)


@pytest.mark.parametrize("used", [1, CONTEXT - 1, CONTEXT, 3 * CONTEXT + 1])
def test_a_reset_row_is_a_fresh_row_and_the_other_goes_on(used: int) -> None:
    before, after = qkv(2, used, seed=1), qkv(2, 15, seed=2)
    cache = ring(2)
    streamed(cache, before, [1] * used)
    cache.reset(torch.tensor([1]))
    out = streamed(cache, after, [1] * 15)
    both = [torch.cat(pair, dim=1) for pair in zip(before, after, strict=True)]
    torch.testing.assert_close(out[:1], brute_force(both)[:1, used:], **CLOSE)
    torch.testing.assert_close(out[1:], brute_force(after)[1:], **CLOSE)


def test_layers_do_not_share_keys() -> None:
    first, second = qkv(1, 12, seed=1), qkv(1, 12, seed=2)
    cache, out = ring(1), []
    for step in range(12):
        cache.begin(1)
        cache.attend(0, *(x[:, step : step + 1] for x in first))
        out.append(cache.attend(1, *(x[:, step : step + 1] for x in second)))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(out, dim=1), brute_force(second), **CLOSE)


def test_more_than_the_ring_was_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match="3 new positions; this cache was made for 1 to 2"):
        ring(1, max_new=2).begin(3)


def test_whole_clips_have_no_ring_window() -> None:
    with pytest.raises(ValueError, match="exact window"):
        WholeClip(spec(window="ring"), num_rows=1, length=4, device=torch.device("cpu"))


@given(
    rows=st.lists(st.integers(0, 19), min_size=1, unique=True).map(sorted),
    warm_up=st.lists(st.integers(0, 2), min_size=20, max_size=20),
    num_new=st.integers(1, 2),
)
def test_a_call_with_some_rows_gives_them_what_a_call_with_all_gives(
    rows: list[int], warm_up: list[int], num_new: int
) -> None:
    """Any choice of rows, with holes and runs of any length, each row at its own position."""
    caches = ring(20, max_new=2), ring(20, max_new=2)
    for seed in range(5):
        before = qkv(20, 2, seed)
        for cache in caches:
            call(cache, before)
            cache.advance(torch.tensor(warm_up))
    new = qkv(20, num_new, seed=9)
    everyone = call(caches[0], new)
    caches[1].begin(num_new, rows=rows)
    some = caches[1].attend(0, *(x[rows] for x in new))
    torch.testing.assert_close(some, everyone[rows], **CLOSE)
    caches[1].advance(num_new, rows=rows)
    expected = torch.tensor([5 * count + num_new * (row in rows) for row, count in enumerate(warm_up)])
    assert torch.equal(caches[1].position_B, expected)
