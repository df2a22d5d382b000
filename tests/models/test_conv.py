"""A causal convolution may be cut anywhere and never hears the future."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, pad

from models.conv import CausalConv1d

KERNEL_AND_STRIDE = [(1, 1), (3, 1), (7, 1), (4, 2), (8, 4), (16, 8)]


def convolution(kernel_size: int, stride: int) -> CausalConv1d:
    torch.manual_seed(0)
    conv = CausalConv1d(3, 5, kernel_size, stride=stride)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    return conv.requires_grad_(False)


def streamed(conv: CausalConv1d, pieces: list[Tensor]) -> Tensor:
    context, out = conv.new_context(pieces[0].shape[0]), []
    for piece in pieces:
        done, context = conv(piece, context)
        out.append(done)
    return torch.cat(out, dim=-1)


@given(
    shape=st.sampled_from(KERNEL_AND_STRIDE),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    rest=st.integers(0, 7),
)
def test_streaming_equals_one_shot(shape: tuple[int, int], lengths: list[int], rest: int) -> None:
    """Pieces of any number of strides, the last one with any number of samples more."""
    conv, (_, stride) = convolution(*shape), shape
    sizes = [length * stride for length in lengths]
    sizes[-1] += rest % stride
    x = torch.randn(2, 3, sum(sizes))
    whole = streamed(conv, [x])
    # The same sums, taken in another order when the backend picks another kernel for another length.
    torch.testing.assert_close(streamed(conv, list(x.split(sizes, dim=-1))), whole, atol=1e-5, rtol=1e-5)
    assert whole.shape[-1] == -(-x.shape[-1] // stride)


@pytest.mark.parametrize(("kernel_size", "stride"), KERNEL_AND_STRIDE)
def test_it_is_a_convolution_after_silence(kernel_size: int, stride: int) -> None:
    """And before silence, where the end of the stream leaves a stride incomplete."""
    conv = convolution(kernel_size, stride)
    for rest in range(stride):
        x = torch.randn(2, 3, 10 * stride + rest)
        padded = pad(x, (kernel_size - stride, -rest % stride))
        assert torch.equal(streamed(conv, [x]), conv1d(padded, conv.weight, conv.bias, stride=stride))


@pytest.mark.parametrize(("kernel_size", "stride"), KERNEL_AND_STRIDE)
def test_the_future_changes_nothing(kernel_size: int, stride: int) -> None:
    conv, x = convolution(kernel_size, stride), torch.randn(1, 3, 12 * stride)
    other = torch.cat([x[..., : 7 * stride], torch.randn(1, 3, 5 * stride)], dim=-1)
    before, after = streamed(conv, [x]), streamed(conv, [other])
    assert torch.equal(before[..., :7], after[..., :7])
    assert not torch.equal(before[..., 7:], after[..., 7:])
