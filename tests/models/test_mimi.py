"""Mimi's codes depend on the stream's audio alone: not on cuts, neighbours, or who had the row before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.checkpoint import Checkpoint
from models.memory import WholeClip, Window
from models.mimi import MimiEncoder
from tests.tiny import FRAME_SAMPLES, NUM_CODEBOOKS, clip

NUM_FRAMES = 60  # 120 latents: six windows


@pytest.fixture(scope="module", params=["exact", "ring"])
def mimi(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> MimiEncoder:
    window: Window = request.param
    return tiny_checkpoint.load_mimi(window=window)


def audio(*seeds: int, num_samples: int = NUM_FRAMES * FRAME_SAMPLES) -> Tensor:
    return torch.stack([torch.from_numpy(clip(seed, num_samples)) for seed in seeds])


def test_rates(mimi: MimiEncoder) -> None:
    assert (mimi.config.latent_samples, mimi.config.frame_samples) == (960, FRAME_SAMPLES)
    assert mimi.config.frame_rate_hz == 12.5


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=14), max_frames=st.integers(1, 9))
def test_streaming_equals_one_shot(mimi: MimiEncoder, sizes: list[int], max_frames: int) -> None:
    """Calls of any size, over an internal pass of any size."""
    samples = audio(0, num_samples=sum(sizes) * FRAME_SAMPLES)
    state = mimi.new_state(1, max_frames=max_frames)
    pieces = samples.split([size * FRAME_SAMPLES for size in sizes], dim=1)
    streamed = torch.cat([mimi.encode(piece, state) for piece in pieces], dim=-1)
    assert torch.equal(streamed, mimi.encode(samples))
    assert streamed.shape == (1, NUM_CODEBOOKS, sum(sizes))


def test_long_audio_is_encoded_in_passes_that_do_not_show(mimi: MimiEncoder) -> None:
    """One-shot takes ten seconds at a time; here is more, against a single pass over all of it."""
    samples = audio(0, num_samples=140 * FRAME_SAMPLES)
    assert torch.equal(mimi.encode(samples), mimi.encode(samples, mimi.new_state(1, max_frames=140)))


def test_rows_do_not_meet(mimi: MimiEncoder) -> None:
    batch = mimi.encode(audio(0, 1, 2))
    for row in range(3):
        assert torch.equal(batch[row : row + 1], mimi.encode(audio(row)))


@pytest.mark.parametrize("num_before", [1, 9, 10, 37])
def test_a_reset_row_is_a_fresh_row_and_the_other_goes_on(mimi: MimiEncoder, num_before: int) -> None:
    cut, samples = num_before * FRAME_SAMPLES, audio(0, 1)
    state = mimi.new_state(2, max_frames=NUM_FRAMES)
    mimi.encode(samples[:, :cut], state)
    state.reset(torch.tensor([1]))
    after = mimi.encode(samples[:, cut:], state)
    assert torch.equal(after[:1], mimi.encode(samples[:1])[..., num_before:])
    assert torch.equal(after[1:], mimi.encode(samples[1:, cut:]))


def test_the_first_latent_is_repeated_not_preceded_by_silence(tiny_mimi: MimiEncoder) -> None:
    samples, length = audio(0, num_samples=5 * FRAME_SAMPLES), 10
    latents, _ = tiny_mimi.seanet(samples, tiny_mimi.seanet.new_contexts(1))
    clip_memory = WholeClip(tiny_mimi.attention_spec, num_rows=1, length=length, device=samples.device)
    latents = tiny_mimi.transformer(latents.transpose(1, 2), clip_memory).transpose(1, 2)
    frames = torch.nn.functional.conv1d(
        torch.nn.functional.pad(latents, (2, 0), mode="replicate"), tiny_mimi.downsample.weight, stride=2
    )
    assert torch.equal(tiny_mimi.encode(samples), tiny_mimi.quantizer(frames))


def test_partial_frames_are_completed_only_where_the_audio_ends(mimi: MimiEncoder) -> None:
    samples = audio(0, num_samples=3 * FRAME_SAMPLES + 700)
    padded = torch.nn.functional.pad(samples, (0, FRAME_SAMPLES - 700))
    assert torch.equal(mimi.encode(samples), mimi.encode(padded))
    per_layer = mimi.encode(samples, ending="per-layer")
    assert torch.equal(per_layer[..., :3], mimi.encode(samples)[..., :3])
    assert per_layer.shape == (1, NUM_CODEBOOKS, 4)
    state = mimi.new_state(1, max_frames=8)
    with pytest.raises(ValueError, match=r"6460 samples are not whole frames of 1920"):
        mimi.encode(samples, state)


@pytest.mark.parametrize("num_before", [1, 9, 37])
def test_a_row_that_sits_out_a_call_stays_where_it_is(mimi: MimiEncoder, num_before: int) -> None:
    cut, samples = num_before * FRAME_SAMPLES, audio(0, 1)
    state = mimi.new_state(2, max_frames=NUM_FRAMES)
    mimi.encode(samples[:, :cut], state)
    for _ in range(3):
        mimi.encode(audio(2, 3, num_samples=5 * FRAME_SAMPLES), state, moving_B=torch.tensor([False, False]))
        mimi.encode(audio(4, 5, num_samples=5 * FRAME_SAMPLES), state, moving_B=torch.tensor([False, True]))
    after = mimi.encode(samples[:, cut:], state, moving_B=torch.tensor([True, False]))
    assert torch.equal(after[:1], mimi.encode(samples[:1])[..., num_before:])


def test_between_calls_no_more_is_kept_than_is_needed(tiny_mimi: MimiEncoder) -> None:
    """The contexts were views once, and kept every layer's input alive: 250 MB per stream at full size."""
    state = tiny_mimi.new_state(1, max_frames=125)
    tiny_mimi.encode(audio(0), state)
    for context in (*state.conv_contexts, state.latent_context):
        assert context.untyped_storage().nbytes() == context.nbytes


def test_bfloat16_is_close_and_leaves_the_quantizer_alone(tiny_checkpoint: Checkpoint) -> None:
    rounded = tiny_checkpoint.load_mimi().set_precision("bfloat16")
    assert {p.dtype for p in rounded.seanet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in rounded.quantizer.parameters()} == {torch.float32}
    exact, other = tiny_checkpoint.load_mimi().encode(audio(0)), rounded.encode(audio(0))
    # 8 bits of mantissa through a dozen layers: the first codebook mostly survives, the last ones are about the rest.
    assert (exact == other)[:, 0].float().mean() > 0.5
    assert not torch.equal(exact, other)
    state = rounded.new_state(1, max_frames=7)
    streamed = torch.cat([rounded.encode(piece, state) for piece in audio(0).split(7 * FRAME_SAMPLES, dim=1)], dim=-1)
    assert (streamed == other)[:, 0].float().mean() > 0.9


def test_no_audio_no_codes(mimi: MimiEncoder) -> None:
    assert mimi.encode(torch.zeros(2, 0)).shape == (2, NUM_CODEBOOKS, 0)
