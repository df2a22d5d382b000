"""Causal convolution over time whose left context is an explicit tensor, so that a stream can be cut anywhere."""

# B rows, C channels, L samples, P context samples.

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalConv1d(nn.Module):
    """A strided convolution that sees `kernel_size - stride` samples of the past and none of the future."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.stride = stride
        self.context_size = kernel_size - stride

    def new_context(self, num_rows: int) -> Tensor:
        """The context of a stream that begins: silence, `[B, C, P]`."""
        return self.weight.new_zeros(num_rows, self.weight.shape[1], self.context_size)

    def forward(self, x_BCL: Tensor, context_BCP: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve the next L samples; -> output `[B, C', ceil(L / stride)]` and the context of the next call.

        L must be a multiple of the stride, but for the last call of a stream: there, zeros make up what is missing.
        """
        missing = -x_BCL.shape[-1] % self.stride
        if missing:
            x_BCL = F.pad(x_BCL, (0, missing))
        extended = torch.cat([context_BCP, x_BCL], dim=-1) if self.context_size else x_BCL
        out = F.conv1d(extended, self.weight, self.bias, stride=self.stride)
        # A copy: a view would keep all of `extended` until the next call, at full size 61 MB for ten seconds of audio.
        return out, extended[..., extended.shape[-1] - self.context_size :].clone()
