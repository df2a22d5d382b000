"""The transformer is the same function whether its memory is a ring or the clip."""

import pytest
import torch
from torch import Tensor, nn

from models.layers import GatedMLP, RMSNorm, rotary_tables, rotate
from models.memory import AttentionSpec, RingCache, WholeClip
from models.transformer import Attention, Block, Transformer

DIM, LENGTH = 16, 30
SPEC = AttentionSpec(num_layers=3, num_heads=2, head_dim=8, context=7, rope_theta=1e4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    blocks = [
        Block(
            attention=Attention(DIM, SPEC.num_heads),
            mlp=GatedMLP(DIM, 24),
            make_norm=lambda: RMSNorm(DIM, eps=1e-8),
            make_scale=nn.Identity,
        )
        for _ in range(SPEC.num_layers)
    ]
    for block in blocks:
        nn.init.ones_(block.norm1.weight)
        nn.init.ones_(block.norm2.weight)
    return Transformer(blocks).requires_grad_(False)


def whole(transformer: Transformer, x_BTD: Tensor) -> Tensor:
    return transformer(x_BTD, WholeClip(SPEC, num_rows=x_BTD.shape[0], length=x_BTD.shape[1], device=CPU))


def streamed(transformer: Transformer, x_BTD: Tensor, piece: int) -> Tensor:
    cache = RingCache(SPEC, num_rows=x_BTD.shape[0], max_new=piece, device=CPU, dtype=torch.float32)
    out = []
    for part in x_BTD.split(piece, dim=1):
        cache.begin(part.shape[1])
        out.append(transformer(part, cache))
        cache.advance(part.shape[1])
    return torch.cat(out, dim=1)


def test_a_block_is_what_it_says(transformer: Transformer) -> None:
    """Attention and MLP spelt out, on a clip of one window."""
    block, length = transformer.layers[0], SPEC.context
    x = torch.randn(1, length, DIM)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)
    q, k, v = (normed @ part.T for part in block.attention.qkv.weight.chunk(3))
    cos, sin = rotary_tables(torch.arange(length)[None], head_dim=SPEC.head_dim, theta=SPEC.rope_theta)
    q, k = (rotate(part.unflatten(-1, (2, 8)), cos, sin) for part in (q, k))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 8**0.5
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
    heard = torch.einsum("bhqk,bkhe->bqhe", weights, v.unflatten(-1, (2, 8))).flatten(2)
    middle = x + heard @ block.attention.out.weight.T
    clip = WholeClip(SPEC, num_rows=1, length=length, device=CPU)
    torch.testing.assert_close(block(x, 0, clip), middle + block.mlp(block.norm2(middle)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("piece", [1, 2, 7, 30])
def test_ring_equals_whole_clip(transformer: Transformer, piece: int) -> None:
    x = torch.randn(2, LENGTH, DIM)
    # Three layers of float32 sums in another order, values of size 1 to 10.
    torch.testing.assert_close(streamed(transformer, x, piece), whole(transformer, x), atol=2e-5, rtol=1e-5)


def test_the_future_changes_nothing(transformer: Transformer) -> None:
    x = torch.randn(1, LENGTH, DIM)
    other = torch.cat([x[:, :20], torch.randn(1, LENGTH - 20, DIM)], dim=1)
    before, after = whole(transformer, x), whole(transformer, other)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


def test_each_layer_looks_one_window_back(transformer: Transformer) -> None:
    """Three layers of window 7 reach 18 positions back, and no further."""
    x = torch.randn(1, LENGTH, DIM)
    other = x.clone()
    other[:, 5] += 1
    changed = (whole(transformer, x) - whole(transformer, other)).abs().amax(dim=(0, 2)) > 1e-6
    assert changed[5 : 5 + 18 + 1].all()
    assert not changed[:5].any()
    assert not changed[5 + 18 + 1 :].any()


def test_rows_do_not_meet(transformer: Transformer) -> None:
    x = torch.randn(3, LENGTH, DIM)
    torch.testing.assert_close(whole(transformer, x)[1:2], whole(transformer, x[1:2]))
