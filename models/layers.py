"""Norms, gated MLP, rotary embedding: the small parts both transformers are made of."""

# B rows, T frames, D channels, H heads, E channels per head.

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_TRITON = find_spec("triton") is not None


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back. Source: moshi `rms_norm_f32`, which scales before the cast."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        if _has_kernels(x_BTD):
            return add_and_norm(x_BTD, None, self)[1]
        x = x_BTD.float()
        scale = self.weight.float() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(x_BTD.dtype)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.layer_norm(x_BTD, (x_BTD.shape[-1],), self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    """One learnt factor per channel on a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.weight


class GatedMLP(nn.Module):
    """`down(silu(a) * b)` with `[a | b] = up(x)`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(silu_times(self.up(x_BTD)))


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with the exact, not the tanh, gelu."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))


def add_and_norm(x_BTD: Tensor, branch_BTD: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`x + branch` and its norm; without a branch, x and its norm."""
    if isinstance(norm, RMSNorm) and _has_kernels(x_BTD):
        from models.glue_kernels import add_and_rms_norm

        return add_and_rms_norm(x_BTD, branch_BTD, norm.weight, eps=norm.eps)
    if branch_BTD is not None:
        x_BTD = x_BTD + branch_BTD
    return x_BTD, norm(x_BTD)


def silu_times(gate_and_value: Tensor) -> Tensor:
    """`silu(a) * b` of `[..., a | b]`."""
    if _has_kernels(gate_and_value):
        from models import glue_kernels

        return glue_kernels.silu_times(gate_and_value)
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def _has_kernels(x: Tensor) -> bool:
    """Whether `models/glue_kernels.py` can be used: on a GPU with triton, and nothing is to be differentiated."""
    return _HAS_TRITON and x.is_cuda and not torch.is_grad_enabled()


def rotary_tables(position_BT: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at absolute positions: two float32 `[B, T, 1, E/2]`.

    Source: moshi `rope.py`; angles in float32 also when the model is bfloat16.
    """
    half = torch.arange(head_dim // 2, device=position_BT.device, dtype=torch.float32)
    frequency = torch.exp(half * (-math.log(theta) * 2 / head_dim))
    angle = position_BT[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + E/2). Weights of interleaved layout are permuted when they are loaded."""
    first, second = x_BTHE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BTHE.dtype)
