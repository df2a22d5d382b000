"""Codes and tokens are those of transformers 5.23: 100.00 % equal in float32, windows rolling.

transformers is not skipped when it is missing: a proof that did not run must not look like one that did.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import KyutaiSpeechToTextForConditionalGeneration

from models.checkpoint import Checkpoint, open_checkpoint
from models.mimi import MimiEncoder
from tests.streams import generate_alone
from tests.tiny import AUDIO_CARD, CONTEXT, FRAME_SAMPLES, NUM_CODEBOOKS, TEXT_CARD, clip, write_trfs

pytestmark = pytest.mark.oracle

NUM_FRAMES = 60  # four windows of the decoder, six of Mimi
AUDIO_BOS_ROW = 300  # a row of the shared table that belongs to a codebook, as 48000 does in the released 2.6B


@pytest.fixture(scope="module")
def theirs(tiny_trfs: Path) -> KyutaiSpeechToTextForConditionalGeneration:
    return load(tiny_trfs)


@pytest.fixture(scope="module")
def ours(tiny_trfs: Path) -> Checkpoint:
    return open_checkpoint(tiny_trfs)


@pytest.fixture(scope="module")
def mimi(ours: Checkpoint) -> MimiEncoder:
    return ours.load_mimi()


def load(folder: Path) -> KyutaiSpeechToTextForConditionalGeneration:
    return KyutaiSpeechToTextForConditionalGeneration.from_pretrained(folder).eval()


def audio(seed: int, num_samples: int = NUM_FRAMES * FRAME_SAMPLES) -> Tensor:
    return torch.from_numpy(clip(seed, num_samples))[None]


def their_codes(model: KyutaiSpeechToTextForConditionalGeneration, samples_BS: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.codec_model.encode(samples_BS[:, None]).audio_codes


def their_tokens(
    model: KyutaiSpeechToTextForConditionalGeneration, samples_BS: Tensor, *, window: int | None
) -> list[int]:
    """Their tokens, without the BOS that stands before them."""
    # What an argument leaves unset, `generate` takes from the model's own configuration: so it is that which changes.
    released = model.generation_config
    model.generation_config = copy.deepcopy(released)
    del model.generation_config.audio_window_size
    if window is not None:
        model.generation_config.audio_window_size = window
    try:
        return model.generate(input_values=samples_BS[:, None])[0, 1:].tolist()
    finally:
        model.generation_config = released


def our_codes(mimi: MimiEncoder, samples_BS: Tensor) -> np.ndarray:
    return mimi.encode(samples_BS)[0].numpy().astype(np.int16)


def first_frame_twice(samples_BS: Tensor) -> Tensor:
    return torch.cat([samples_BS[:, :FRAME_SAMPLES], samples_BS], dim=1)


def test_the_weights_are_not_degenerate(
    theirs: KyutaiSpeechToTextForConditionalGeneration, ours: Checkpoint, mimi: MimiEncoder
) -> None:
    """Equality of constants would prove nothing."""
    codes = their_codes(theirs, audio(0))
    assert min(len(codes[0, book].unique()) for book in range(NUM_CODEBOOKS)) > 5
    assert len(set(their_tokens(theirs, audio(0), window=None))) > 20


@pytest.mark.parametrize("seed", range(3))
def test_one_shot_codes(theirs: KyutaiSpeechToTextForConditionalGeneration, mimi: MimiEncoder, seed: int) -> None:
    assert torch.equal(mimi.encode(audio(seed)), their_codes(theirs, audio(seed)))


def test_latents(theirs: KyutaiSpeechToTextForConditionalGeneration, ours: Checkpoint) -> None:
    """What is quantized: differences too small to move one of these codes would move some of a released codebook."""
    mimi, samples = ours.load_mimi(), audio(0)
    mimi.quantizer = torch.nn.Identity()
    with torch.inference_mode():
        expected = theirs.codec_model.encoder(samples[:, None]).latents
    # float32 holds values of this size, up to 30, to 2e-6; two dozen layers have gone over them.
    torch.testing.assert_close(mimi.encode(samples), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("piece_frames", [1, 2, 7, 13, 59])
def test_streamed_codes_however_cut(
    theirs: KyutaiSpeechToTextForConditionalGeneration, mimi: MimiEncoder, piece_frames: int
) -> None:
    state = mimi.new_state(1, max_frames=piece_frames)
    pieces = audio(1).split(piece_frames * FRAME_SAMPLES, dim=1)
    streamed = torch.cat([mimi.encode(piece, state) for piece in pieces], dim=-1)
    assert torch.equal(streamed, their_codes(theirs, audio(1)))


def test_codes_of_a_batch(theirs: KyutaiSpeechToTextForConditionalGeneration, mimi: MimiEncoder) -> None:
    batch = torch.cat([audio(seed) for seed in range(3)])
    assert torch.equal(mimi.encode(batch), their_codes(theirs, batch))


# One sample, half a frame and its neighbours, a frame but one; then lengths that end inside every stride.
@pytest.mark.parametrize("rest", [1, 3, 19, 119, 700, 959, 960, 961, 1333, 1919])
@pytest.mark.parametrize("num_frames", [0, 1, 43])
def test_codes_of_lengths_that_are_not_whole_frames(
    theirs: KyutaiSpeechToTextForConditionalGeneration, mimi: MimiEncoder, num_frames: int, rest: int
) -> None:
    samples = audio(2, num_frames * FRAME_SAMPLES + rest)
    expected = their_codes(theirs, samples)
    assert torch.equal(mimi.encode(samples, ending="per-layer"), expected)
    # Completing the audio instead changes that one frame and nothing before it, and is what they make of such audio.
    silent_end = torch.nn.functional.pad(samples, (0, FRAME_SAMPLES - rest))
    assert torch.equal(mimi.encode(samples), their_codes(theirs, silent_end))
    assert torch.equal(mimi.encode(samples)[..., :num_frames], expected[..., :num_frames])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rest", [0, 1100])
def test_tokens_of_all_frames(
    theirs: KyutaiSpeechToTextForConditionalGeneration, ours: Checkpoint, mimi: MimiEncoder, seed: int, rest: int
) -> None:
    """BOS, f0, f1, ...: they stop one token earlier than we do, and a last partial frame is not heard by either."""
    samples = audio(seed, NUM_FRAMES * FRAME_SAMPLES + rest)
    codes = our_codes(mimi, samples)[:, :NUM_FRAMES]
    tokens = generate_alone(ours.load_decoder(), ours.speech, codes)
    assert tokens[:NUM_FRAMES] == their_tokens(theirs, samples, window=None)
    assert len(tokens) == NUM_FRAMES + 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_frames", [1, 2, 3, 17, 60])
def test_tokens_of_the_released_generation_config(
    theirs: KyutaiSpeechToTextForConditionalGeneration, ours: Checkpoint, mimi: MimiEncoder, seed: int, num_frames: int
) -> None:
    """`audio_window_size: 1` encodes the first frame twice and leaves the last two unheard."""
    assert theirs.generation_config.audio_window_size == 1
    assert theirs.codec_model.generation_config.use_cache is True
    samples = audio(seed, num_frames * FRAME_SAMPLES)
    codes = our_codes(mimi, first_frame_twice(samples))
    tokens = generate_alone(ours.load_decoder(), ours.speech, codes, alignment="first-frame-twice")
    assert tokens == theirs.generate(input_values=samples[:, None])[0, 1:].tolist()


def test_tokens_when_bos_is_a_row_of_a_codebook(mimi: MimiEncoder, tmp_path: Path) -> None:
    folder = write_trfs(tmp_path, bos_row=AUDIO_BOS_ROW)
    theirs, ours = load(folder), open_checkpoint(folder)
    codes = our_codes(mimi, first_frame_twice(audio(0)))
    tokens = generate_alone(ours.load_decoder(), ours.speech, codes, alignment="first-frame-twice")
    plain = open_checkpoint(write_trfs(tmp_path / "plain"))
    assert ours.speech.hf_bos_row == AUDIO_BOS_ROW
    assert tokens == their_tokens(theirs, audio(0), window=1)
    assert tokens != generate_alone(plain.load_decoder(), plain.speech, codes, alignment="first-frame-twice")


def test_tokens_where_the_zero_row_of_their_head_wins(mimi: MimiEncoder, tmp_path: Path) -> None:
    """Their head has a row of zeros for the BOS id, which is the best where all other logits are negative."""
    folder = write_trfs(tmp_path, gloomy=True)
    theirs, ours = load(folder), open_checkpoint(folder)
    codes = our_codes(mimi, first_frame_twice(audio(0)))
    tokens = generate_alone(ours.load_decoder(), ours.speech, codes, alignment="first-frame-twice")
    assert tokens == their_tokens(theirs, audio(0), window=1)
    assert 10 < tokens.count(TEXT_CARD) < 50


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_a_checkpoint_that_they_saved_is_ours(
    theirs: KyutaiSpeechToTextForConditionalGeneration,
    tiny_trfs: Path,
    ours: Checkpoint,
    mimi: MimiEncoder,
    tmp_path: Path,
    max_shard_size: str,
) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_trfs / name).read_bytes())
    saved = open_checkpoint(tmp_path)
    assert (saved.decoder, saved.mimi, saved.speech) == (ours.decoder, ours.mimi, ours.speech)
    assert len(saved.decoder_files) == 1 if max_shard_size == "5GB" else len(saved.decoder_files) > 2
    codes = our_codes(saved.load_mimi(), audio(0))
    assert np.array_equal(codes, our_codes(mimi, audio(0)))
    tokens = generate_alone(saved.load_decoder(), saved.speech, codes)
    assert tokens[:NUM_FRAMES] == their_tokens(theirs, audio(0), window=None)


def test_teacher_forcing(
    theirs: KyutaiSpeechToTextForConditionalGeneration, ours: Checkpoint, mimi: MimiEncoder
) -> None:
    """Within one window: beyond it their parallel pass forgets that the window slides, and nothing compares."""
    decoder = ours.load_decoder()
    codes = mimi.encode(torch.cat([audio(0), audio(1)]))[..., : CONTEXT - 1]
    target = torch.randint(TEXT_CARD, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    text = torch.nn.functional.pad(target[:, :-1], (1, 0), value=TEXT_CARD)
    heard = torch.nn.functional.pad(codes, (1, 0), value=AUDIO_CARD)
    ids = torch.cat([text[:, :, None], heard.transpose(1, 2)], dim=2)
    with torch.inference_mode():
        # They shift labels against logits, so the first is never used and our last has no partner.
        labels = torch.nn.functional.pad(target[:, :-1], (1, 0), value=-100)
        expected = theirs(input_ids=ids, labels=labels, use_cache=False)
        logits = decoder.clip_logits(target[:, :-1], codes)
        loss = decoder.loss(torch.nn.functional.pad(target[:, :-1], (0, 1), value=-100), codes)
    # Logits are of size 10 and the same float32 sums in another order; 1e-4 is 100 roundings of such a number.
    torch.testing.assert_close(logits, expected.logits[..., :TEXT_CARD], atol=1e-4, rtol=0)
    assert not expected.logits[..., TEXT_CARD].any()
    # Their softmax has one id more, the zero row: ours cannot have it.
    full = torch.nn.functional.pad(logits, (0, 1))[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(full, target[:, :-1].flatten()), expected.loss, atol=1e-5, rtol=0
    )
    own = torch.nn.functional.cross_entropy(expected.logits[:, :-1, :TEXT_CARD].flatten(0, 1), target[:, :-1].flatten())
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=0)
