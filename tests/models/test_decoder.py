"""The decoder: frame by frame it is what it is over whole clips, window and all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint, open_checkpoint
from models.decoder import Decoder
from tests.tiny import AUDIO_CARD, CONTEXT, DIM, NUM_CODEBOOKS, TEXT_CARD, decoder_tensors, write_original

NUM_FRAMES = 4 * CONTEXT
# Two layers of float32 sums in another order; logits are of size 10.
CLOSE = {"atol": 1e-4, "rtol": 0}


def clip_codes(num_rows: int = 2, num_frames: int = NUM_FRAMES) -> Tensor:
    return torch.randint(AUDIO_CARD, (num_rows, NUM_CODEBOOKS, num_frames))


def clip_text(num_rows: int = 2, num_frames: int = NUM_FRAMES) -> Tensor:
    return torch.randint(TEXT_CARD, (num_rows, num_frames))


def stepwise_hidden(decoder: Decoder, text_BT: Tensor, codes_BKT: Tensor, *, frames_per_pass: int) -> Tensor:
    """Hidden states of the T positions after BOS and of BOS, by way of the ring."""
    text = torch.nn.functional.pad(text_BT, (1, 0), value=TEXT_CARD)
    codes = torch.nn.functional.pad(codes_BKT, (1, 0), value=AUDIO_CARD)
    cache, out = decoder.new_cache(text.shape[0], max_frames=frames_per_pass), []
    for text_part, codes_part in zip(
        text.split(frames_per_pass, dim=1), codes.split(frames_per_pass, dim=2), strict=True
    ):
        cache.begin(text_part.shape[1])
        out.append(decoder.hidden(decoder.embed_audio(codes_part) + decoder.text_embedding(text_part), cache))
        cache.advance(text_part.shape[1])
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("frames_per_pass", [1, 5, CONTEXT, 3 * CONTEXT])
def test_frame_by_frame_equals_the_whole_clip(tiny_decoder: Decoder, frames_per_pass: int) -> None:
    text, codes = clip_text(), clip_codes()
    hidden = stepwise_hidden(tiny_decoder, text, codes, frames_per_pass=frames_per_pass)
    torch.testing.assert_close(tiny_decoder.logits(hidden), tiny_decoder.clip_logits(text, codes), **CLOSE)
    assert hidden.shape == (2, NUM_FRAMES + 1, DIM)


def test_the_window_is_felt(tiny_decoder: Decoder) -> None:
    """A frame reaches the positions of two windows, one a layer, and no later one."""
    text, codes = clip_text(1), clip_codes(1)
    other = codes.clone()
    other[:, :, 0] = (other[:, :, 0] + 1) % AUDIO_CARD
    moved = (tiny_decoder.clip_logits(text, codes) - tiny_decoder.clip_logits(text, other)).abs().amax(dim=(0, 2))
    reach = 2 * (CONTEXT - 1)
    assert not moved[0]  # BOS comes before the first frame
    assert (moved[1 : reach + 2] > 1e-3).all()
    assert moved[reach + 2 :].max() < 1e-4


def test_audio_embeddings_are_summed_over_codebooks(tiny_decoder: Decoder) -> None:
    tensors, codes = decoder_tensors(0, num_extra_heads=4), clip_codes(2, 5)
    codes[0, :, 0] = AUDIO_CARD
    expected = sum(tensors[f"emb.{book}.weight"][codes[:, book]] for book in range(NUM_CODEBOOKS))
    torch.testing.assert_close(tiny_decoder.embed_audio(codes), expected)
    torch.testing.assert_close(tiny_decoder.embed_audio(codes.to(torch.int16)), expected)


def test_rows_of_the_shared_table(tiny_decoder: Decoder) -> None:
    """48000 of the released 2.6B is row 970 of codebook 21 in this numbering; here the arithmetic at tiny size."""
    tensors = decoder_tensors(0, num_extra_heads=4)
    assert torch.equal(tiny_decoder.shared_row(TEXT_CARD), tensors["text_emb.weight"][TEXT_CARD])
    row = TEXT_CARD + 1 + 3 * (AUDIO_CARD + 1) + 17
    assert torch.equal(tiny_decoder.shared_row(row), tensors["emb.3.weight"][17])


def test_loss_is_the_mean_surprise_of_the_targets(tiny_decoder: Decoder) -> None:
    codes = clip_codes(2, 20)
    target = torch.randint(TEXT_CARD, (2, 21))
    target[1, 15:] = -100
    logprobs = tiny_decoder.clip_logits(target[:, :-1].clamp(min=0), codes).log_softmax(-1)
    said = [logprobs[0, range(21), target[0]], logprobs[1, range(15), target[1, :15]]]
    torch.testing.assert_close(tiny_decoder.loss(target, codes), -torch.cat(said).mean())
    padded = torch.where(target == -100, 7777, target)
    torch.testing.assert_close(tiny_decoder.loss(padded, codes, ignore_id=7777), tiny_decoder.loss(target, codes))


def test_every_weight_can_be_trained(tiny_checkpoint: Checkpoint) -> None:
    decoder = tiny_checkpoint.load_decoder().requires_grad_(True)
    decoder.loss(torch.randint(TEXT_CARD, (1, 21)), clip_codes(1, 20)).backward()
    untouched = [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert untouched == [f"extra_heads.{head}.weight" for head in range(4)]  # the loss is about text


def test_pauses_are_probabilities(tiny_decoder: Decoder) -> None:
    hidden = tiny_decoder.clip_hidden(clip_text(1, 30), clip_codes(1, 30))
    pauses = tiny_decoder.pauses(hidden)
    assert pauses.shape == (1, 31, 4)
    assert ((pauses > 0) & (pauses < 1)).all()
    expected = (hidden @ tiny_decoder.extra_heads[2].weight.T).softmax(-1)[..., 0]
    torch.testing.assert_close(pauses[..., 2], expected)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    """Logits come out in float32, and within a few bfloat16 roundings (2**-8 each) of themselves."""
    checkpoint = open_checkpoint(write_original(tmp_path))
    exact, coarse = checkpoint.load_decoder(), checkpoint.load_decoder(dtype=torch.bfloat16)
    text, codes = clip_text(1, 12), clip_codes(1, 12)
    assert coarse.dtype == torch.bfloat16
    with torch.inference_mode():
        expected, logits = exact.clip_logits(text, codes), coarse.clip_logits(text, codes)
    assert logits.dtype == torch.float32
    # Two layers of about ten roundings each over values of spread 4.
    assert (logits - expected).abs().max() < 20 * 2**-8 * expected.std()
