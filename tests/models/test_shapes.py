"""Named shapes are the released ones, and their random weights are alive."""

import pytest
import torch

from models.config import RELEASED_MIMI, mimi_config_from_original
from models.shapes import SHAPES, random_decoder, random_mimi

TINY = SHAPES["tiny"]


@pytest.mark.parametrize(("name", "seconds"), [("2.6b", 30), ("1b", 60)])
def test_released_shapes_see_the_released_seconds(name: str, seconds: int) -> None:
    shape = SHAPES[name]
    assert shape.decoder.context / shape.mimi.frame_rate_hz == seconds
    assert shape.mimi == mimi_config_from_original(RELEASED_MIMI, num_codebooks=32)


@pytest.mark.parametrize("name", SHAPES)
def test_codec_and_decoder_fit(name: str) -> None:
    shape = SHAPES[name]
    assert shape.mimi.num_codebooks == shape.decoder.num_codebooks
    assert shape.mimi.codebook_size == shape.decoder.audio_card
    assert shape.mimi.frame_samples == 1920


def test_tokens_vary() -> None:
    decoder, rng = random_decoder(TINY.decoder), torch.Generator().manual_seed(0)
    codes = torch.randint(64, (1, 8, 200), generator=rng)
    logits = decoder.clip_logits(torch.randint(64, (1, 200), generator=rng), codes)
    assert len(logits.argmax(-1).unique()) > 20


def test_codes_vary() -> None:
    samples = 0.1 * torch.randn(1, 100 * 1920, generator=torch.Generator().manual_seed(0))
    codes = random_mimi(TINY.mimi).encode(samples)
    assert codes.shape == (1, 8, 100)
    assert len(codes.unique()) > 20


def test_a_seed_makes_the_same_weights_and_another_others() -> None:
    first, again, other = (random_decoder(TINY.decoder, seed=seed).text_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_precision_is_as_asked() -> None:
    decoder = random_decoder(TINY.decoder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
