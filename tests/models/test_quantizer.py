"""Codes name the nearest vectors; meaning and sound are quantized side by side, codebooks one after the other."""

import torch
from torch import Tensor

from models.mimi import MimiEncoder
from models.quantizer import ResidualQuantizer, SplitQuantizer
from tests.tiny import AUDIO_CARD, CODE_DIM, MIMI_DIM, NUM_CODEBOOKS


def quantizer(num_codebooks: int) -> ResidualQuantizer:
    torch.manual_seed(0)
    made = ResidualQuantizer(
        latent_dim=MIMI_DIM, code_dim=CODE_DIM, num_codebooks=num_codebooks, codebook_size=AUDIO_CARD
    )
    torch.nn.init.normal_(made.codebooks_KVQ)
    return made.requires_grad_(False)


def split_quantizer(mimi: MimiEncoder) -> SplitQuantizer:
    """One of its own, to be changed."""
    made = SplitQuantizer(mimi.config)
    made.load_state_dict(mimi.quantizer.state_dict())
    return made.requires_grad_(False)


def latents(num_frames: int = 40) -> Tensor:
    return torch.randn(2, num_frames, MIMI_DIM)


def test_every_code_is_the_nearest_vector_to_what_is_left() -> None:
    """Against exact distances in float64; a code may only lose to one that is nearer by less than float32 can tell."""
    residual_quantizer, x = quantizer(4), latents()
    codes_BKT = residual_quantizer(x)
    left = residual_quantizer.input_proj(x).double()
    for book_VQ, codes_BT in zip(residual_quantizer.codebooks_KVQ.double(), codes_BKT.unbind(1), strict=True):
        distances = (left[:, :, None] - book_VQ).norm(dim=-1)
        chosen = distances.gather(-1, codes_BT[..., None])[..., 0]
        # cdist by products loses about half of float32's digits: 1e-3 of distances of size 4.
        assert (chosen - distances.min(-1).values).max() < 4e-3
        left = left - book_VQ[codes_BT]
    assert len(codes_BKT.unique()) > AUDIO_CARD // 2


def test_fewer_codebooks_are_a_prefix() -> None:
    few, many, x = quantizer(4), quantizer(7), latents()
    few.load_state_dict({**many.state_dict(), "codebooks_KVQ": many.codebooks_KVQ[:4]})
    assert torch.equal(few(x), many(x)[:, :4])


def test_sound_does_not_depend_on_the_codebook_of_meaning(tiny_mimi: MimiEncoder) -> None:
    """Both read the latent itself: a residual carried from the one to the other would change here."""
    split, x = split_quantizer(tiny_mimi), 9 * latents().transpose(1, 2)
    before = split(x)
    split.semantic.codebooks_KVQ.add_(5 * torch.randn_like(split.semantic.codebooks_KVQ))
    after = split(x)
    assert before.shape == (2, NUM_CODEBOOKS, 40)
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1:], after[:, 1:])


def test_codes_of_a_batch_are_codes_alone(tiny_mimi: MimiEncoder) -> None:
    x = 9 * latents(30).transpose(1, 2)
    assert torch.equal(tiny_mimi.quantizer(x)[1:], tiny_mimi.quantizer(x[1:]))
