"""Attention over a ring of keys and values in one kernel: turn, write, and read no more than a row has filled.

Bound by reading the keys and values of the past once; the plain path of `models/memory.py` reads every place of every
ring, through a mask, and takes about twenty kernels for it. One program does one head of one row. It turns the new
queries and keys, writes keys and values to their places, attends to the new ones out of its registers, and then walks
over the past in blocks of positions, from the oldest that its first query sees. What it reads from the ring was
written by earlier calls: the places that it writes are of positions which no query of the call sees.

Importing this needs triton, which the CUDA builds of torch bring along; `models/memory.py` imports it when it is there.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# The body of a kernel is another language with the grammar of this one; a type checker knows nothing about it.

# B rows, T new positions, S ring places, H heads, E channels per head.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_NEW = 64
_HEAD_DIMS = (16, 32, 64, 128)
# Chosen so that the blocks under way of several programs fit into the shared memory of one processor: compiled for
# sm_90 in bfloat16, 34 kB each for heads of 64 and of 128 channels. Not tuned by measuring.
_KEY_BLOCK = 64
_NUM_WARPS = 4
_LOG2_E = 1.4426950408889634


def is_supported(*, head_dim: int, max_new: int) -> bool:
    """Whether the kernel was written for such heads and so many new positions."""
    return head_dim in _HEAD_DIMS and max_new <= _MOST_NEW


def ring_attend(
    q_BTHE: Tensor,
    k_BTHE: Tensor,
    v_BTHE: Tensor,
    *,
    keys_BHSE: Tensor,
    values_BHSE: Tensor,
    position_B: Tensor,
    cos: Tensor,
    sin: Tensor,
    context: int,
    like_moshi: bool,
) -> Tensor:
    """Remember k and v, return the attention output `[B, T, H, E]`.

    Args:
        q_BTHE: not yet turned, as `k_BTHE`; the three are laid out alike, as views of one product are.
        keys_BHSE: one layer's ring of turned keys, contiguous, written in place; `values_BHSE` alike.
        position_B: int64, the position of the first new query of every row.
        cos: float32 `[B, T, 1, E/2]` of `rotary_tables`, contiguous; `sin` alike.
        context: positions that a query sees, its own included; the ring has T - 1 places more, or still more.
        like_moshi: the window `ring` of `models/memory.py`, not `exact`.
    """
    num_rows, num_new, num_heads, head_dim = q_BTHE.shape
    assert q_BTHE.stride() == k_BTHE.stride() == v_BTHE.stride()
    assert q_BTHE.stride(3) == 1
    assert all(x.is_contiguous() for x in (keys_BHSE, values_BHSE, cos, sin))
    assert keys_BHSE.dtype == values_BHSE.dtype == q_BTHE.dtype
    out_BTHE = torch.empty((num_rows, num_new, num_heads, head_dim), device=q_BTHE.device, dtype=q_BTHE.dtype)
    _attend[(num_heads, num_rows)](
        q_BTHE,
        k_BTHE,
        v_BTHE,
        cos,
        sin,
        position_B,
        keys_BHSE,
        values_BHSE,
        out_BTHE,
        scale=_LOG2_E / math.sqrt(head_dim),
        STRIDE_B=q_BTHE.stride(0),
        STRIDE_T=q_BTHE.stride(1),
        STRIDE_H=q_BTHE.stride(2),
        T=num_new,
        H=num_heads,
        S=keys_BHSE.shape[2],
        E=head_dim,
        CONTEXT=context,
        LIKE_MOSHI=like_moshi,
        BLOCK_T=max(16, triton.next_power_of_2(num_new)),  # a product on tensor cores has 16 rows or more
        BLOCK_S=_KEY_BLOCK,
        num_warps=_NUM_WARPS,
        num_stages=3 if head_dim <= 64 else 2,  # blocks of keys and values under way, and one more
    )
    return out_BTHE


@triton.jit
def _turned(x_ptr, own, partner, cos, sin, is_new):
    x = tl.load(x_ptr + own, mask=is_new[:, None], other=0.0).to(tl.float32) * cos
    x += tl.load(x_ptr + partner, mask=is_new[:, None], other=0.0).to(tl.float32) * sin
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def _wrapped(place, S):
    return tl.where(place >= S, place - S, place)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    scale,
    STRIDE_B: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    CONTEXT: tl.constexpr,
    LIKE_MOSHI: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first = tl.load(position_ptr + row).to(tl.int32)
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, E)
    is_new = t < T
    # Rows beyond T repeat the last query's window: their sums are finite, and not stored.
    query = first + tl.minimum(t, T - 1)
    oldest = query - CONTEXT + 1
    oldest_of_all = first - CONTEXT + 1
    if LIKE_MOSHI:
        oldest = (query | 1) - CONTEXT + 1
        oldest_of_all = (first | 1) - CONTEXT + 1

    # Turn channel pairs (i, i + E/2), as `models/layers.rotate`: every channel is loaded with its partner.
    here = row * STRIDE_B + t[:, None] * STRIDE_T + head * STRIDE_H
    own, partner = here + e[None, :], here + ((e + E // 2) % E)[None, :]
    angle = (row * T + t[:, None]) * (E // 2) + (e % (E // 2))[None, :]
    cos = tl.load(cos_ptr + angle, mask=is_new[:, None], other=0.0)
    sin = tl.load(sin_ptr + angle, mask=is_new[:, None], other=0.0)
    sin = tl.where((e < E // 2)[None, :], -sin, sin)
    q = _turned(q_ptr, own, partner, cos, sin, is_new)
    k = _turned(k_ptr, own, partner, cos, sin, is_new)
    v = tl.load(v_ptr + own, mask=is_new[:, None], other=0.0)

    ring = (row * H + head) * S * E
    written = ring + _wrapped(first % S + t, S)[:, None] * E + e[None, :]
    tl.store(keys_ptr + written, k, mask=is_new[:, None])
    tl.store(values_ptr + written, v, mask=is_new[:, None])

    # The new positions, of which every query sees at least itself.
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    new = first + t
    seen = (new[None, :] <= query[:, None]) & (new[None, :] >= oldest[:, None]) & is_new[None, :]
    score = tl.where(seen, score, float("-inf"))
    peak = tl.max(score, 1)
    weight = tl.exp2(score - peak[:, None])
    total = tl.sum(weight, 1)
    out = tl.dot(weight.to(v.dtype), v, input_precision="ieee")

    # The past, which ends where the new positions begin.
    start = tl.maximum(oldest_of_all, 0)
    for offset in range(0, first - start, BLOCK_S):
        index = offset + tl.arange(0, BLOCK_S)
        is_past = index < first - start
        read = ring + _wrapped(start % S + index, S)[:, None] * E + e[None, :]
        key = tl.load(keys_ptr + read, mask=is_past[:, None], other=0.0)
        value = tl.load(values_ptr + read, mask=is_past[:, None], other=0.0)
        past_score = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        in_window = is_past[None, :] & ((start + index)[None, :] >= oldest[:, None])
        past_score = tl.where(in_window, past_score, float("-inf"))
        higher = tl.maximum(peak, tl.max(past_score, 1))
        past_weight = tl.exp2(past_score - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(past_weight, 1)
        out = out * shrink[:, None] + tl.dot(past_weight.to(value.dtype), value, input_precision="ieee")
        peak = higher

    result = ((row * T + t[:, None]) * H + head) * E + e[None, :]
    tl.store(out_ptr + result, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_new[:, None])
