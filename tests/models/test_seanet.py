"""SEANet: one latent per 960 samples, causal, and the same however the audio is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, elu, pad

from models.mimi import MimiEncoder
from models.seanet import SEANet
from tests.tiny import MIMI_DIM, STRIDES, clip

LATENT_SAMPLES = 960
# Eleven float32 convolutions over values of size 1 to 10, whose sums are grouped by the length of the piece.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def seanet(tiny_mimi: MimiEncoder) -> SEANet:
    return tiny_mimi.seanet


def audio(num_latents: int) -> Tensor:
    return torch.from_numpy(clip(3, num_latents * LATENT_SAMPLES))[None]


def streamed(seanet: SEANet, pieces: list[Tensor]) -> Tensor:
    contexts, out = seanet.new_contexts(pieces[0].shape[0]), []
    for piece in pieces:
        latents, contexts = seanet(piece, contexts)
        out.append(latents)
    return torch.cat(out, dim=-1)


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_streaming_equals_one_shot(seanet: SEANet, sizes: list[int]) -> None:
    samples = audio(sum(sizes))
    pieces = samples.split([size * LATENT_SAMPLES for size in sizes], dim=1)
    whole = streamed(seanet, [samples])
    assert whole.shape == (1, MIMI_DIM, sum(sizes))
    torch.testing.assert_close(streamed(seanet, list(pieces)), whole, **CLOSE)


def test_it_is_the_published_stack(seanet: SEANet) -> None:
    """Every convolution after silence, ELU before all but the first, and a shortcut around two of each stage."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        layer = seanet.get_submodule(name)
        return conv1d(pad(x, (layer.weight.shape[-1] - stride, 0)), layer.weight, layer.bias, stride=stride)

    x = conv(audio(6)[:, None], "first")
    for index, stride in enumerate(STRIDES):
        hidden = conv(elu(x), f"stages.{index}.narrow")
        x = x + conv(elu(hidden), f"stages.{index}.widen")
        x = conv(elu(x), f"stages.{index}.down", stride)
    assert torch.equal(streamed(seanet, [audio(6)]), conv(elu(x), "last"))


def test_the_future_changes_nothing(seanet: SEANet) -> None:
    samples, other = audio(12), audio(12)
    other[:, 5 * LATENT_SAMPLES :] *= -0.5
    before, after = streamed(seanet, [samples]), streamed(seanet, [other])
    assert torch.equal(before[..., :5], after[..., :5])
    # The very first sample that differs is heard in the latent it belongs to.
    assert (before[..., 5:] - after[..., 5:]).abs().amax(dim=1).min() > 1e-3


def test_every_sample_is_heard(seanet: SEANet) -> None:
    samples = audio(3)
    whole = streamed(seanet, [samples])
    for position in range(0, 3 * LATENT_SAMPLES, 157):
        other = samples.clone()
        other[:, position] += 0.5
        assert (streamed(seanet, [other]) - whole).abs().max() > 1e-4


def test_rows_do_not_meet(seanet: SEANet) -> None:
    batch = torch.cat([audio(6), -audio(6), audio(6).flip(1)])
    torch.testing.assert_close(streamed(seanet, [batch])[1:2], streamed(seanet, [batch[1:2]]), **CLOSE)
