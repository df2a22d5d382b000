"""Norms, MLPs and rotations against their definitions."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.layers import GatedMLP, GeluMLP, LayerNorm, LayerScale, RMSNorm, rotary_tables, rotate


def filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.requires_grad_(False)


def rotated(x_TE: Tensor, positions: list[int], *, theta: float) -> Tensor:
    cos, sin = rotary_tables(torch.tensor([positions]), head_dim=x_TE.shape[-1], theta=theta)
    return rotate(x_TE[None, :, None], cos, sin)[0, :, 0]


def test_rms_norm() -> None:
    norm, x = filled(RMSNorm(16, eps=1e-8)), torch.randn(2, 3, 16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-8).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x), exact.float())  # float32 against float64
    torch.testing.assert_close(norm(1000 * x), norm(x))  # loudness is what it takes away


def test_rms_norm_scales_before_it_rounds() -> None:
    """In bfloat16 the product with the weight is taken in float32 and rounded once."""
    norm, x = filled(RMSNorm(64, eps=1e-8)), torch.randn(4, 64).bfloat16()
    in_float = norm(x.float())
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), in_float.bfloat16())


def test_layer_norm_and_scale() -> None:
    norm, scale, x = filled(LayerNorm(16, eps=1e-5)), filled(LayerScale(16)), torch.randn(2, 3, 16)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(scale(x), x * scale.weight)


def test_the_first_half_of_the_gated_mlp_is_the_gate() -> None:
    mlp, x = filled(GatedMLP(8, 12)), torch.randn(2, 3, 8)
    gate, value = x @ mlp.up.weight[:12].T, x @ mlp.up.weight[12:].T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * value) @ mlp.down.weight.T)


def test_gelu_is_the_exact_one() -> None:
    mlp, x = filled(GeluMLP(8, 12)), torch.randn(2, 3, 8)
    hidden = x @ mlp.up.weight.T
    expected = (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))) @ mlp.down.weight.T
    # The tanh approximation is off by up to 5e-4 a channel.
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


@given(query=st.integers(0, 400), key=st.integers(0, 400), shift=st.integers(0, 400))
def test_rotations_know_only_distances(query: int, key: int, shift: int) -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(query + key))
    here, there = rotated(x, [query, key], theta=1e4), rotated(x, [query + shift, key + shift], theta=1e4)
    # Angles reach 800 radians, where float32 holds them to 6e-5.
    torch.testing.assert_close(here[0] @ here[1], there[0] @ there[1], atol=5e-3, rtol=0)
    torch.testing.assert_close(here.norm(dim=-1), x.norm(dim=-1))


def test_position_zero_is_not_rotated() -> None:
    x = torch.randn(1, 8)
    assert torch.equal(rotated(x, [0], theta=1e4), x)


def test_the_channel_pairs_and_their_speeds() -> None:
    """Channel i turns with channel i + E/2, by theta ** (-2i / E) radians a position."""
    x, theta, position = torch.eye(8), 100.0, 3
    out = rotated(x, [position] * 8, theta=theta)
    for i in range(4):
        angle = position * theta ** (-2 * i / 8)
        expected = math.cos(angle) * x[i] + math.sin(angle) * x[i + 4]
        torch.testing.assert_close(out[i], expected)


def test_rotation_of_bfloat16_is_done_in_float32() -> None:
    x = torch.randn(5, 16).bfloat16()
    positions = [0, 1, 100, 5000, 40000]
    assert torch.equal(rotated(x, positions, theta=1e5), rotated(x.float(), positions, theta=1e5).bfloat16())
