"""Codes, tokens and pauses are those of moshi 0.2.13: 100.00 % equal in float32, windows rolling.

moshi is not skipped when it is missing: a proof that did not run must not look like one that did.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models import LMGen, LMModel, MimiModel, loaders
from moshi.utils.compile import no_compile
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import Checkpoint, open_checkpoint
from models.mimi import MimiEncoder
from models.slots import Slots
from tests.streams import generate_alone
from tests.tiny import FRAME_SAMPLES, NUM_CODEBOOKS, clip

pytestmark = pytest.mark.oracle

NUM_FRAMES = 60  # four windows of the decoder, six of Mimi

# Keys of config.json that moshi's own loader takes off before it builds the model.
NOT_FOR_THE_MODEL = ("mimi_config_name", "mimi_name", "model_type", "lm_gen_config", "stt_config", "tokenizer_name")


@pytest.fixture(scope="module", autouse=True)
def _eager() -> Iterator[None]:
    with no_compile():
        yield


@pytest.fixture(scope="module")
def their_mimi(tiny_original: Path) -> MimiModel:
    """Our file has no decoding half: the one moshi builds keeps its random start, and nothing else may be missing."""
    model = loaders.get_mimi(None, json.loads((tiny_original / "mimi_config.json").read_text()), num_codebooks=8)
    missing, unexpected = model.load_state_dict(load_file(tiny_original / "mimi.safetensors"), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.startswith(("decoder.", "decoder_transformer.", "upsample."))]
    return model


@pytest.fixture(scope="module")
def their_lm(tiny_original: Path) -> LMModel:
    config = json.loads((tiny_original / "config.json").read_text())
    kwargs = {key: value for key, value in config.items() if key not in NOT_FOR_THE_MODEL}
    return loaders.get_moshi_lm(tiny_original / "model.safetensors", kwargs, dtype=torch.float32)


@pytest.fixture(scope="module")
def ring_mimi(tiny_checkpoint: Checkpoint) -> MimiEncoder:
    return tiny_checkpoint.load_mimi(window="ring")


def audio(seed: int, num_samples: int = NUM_FRAMES * FRAME_SAMPLES) -> Tensor:
    return torch.from_numpy(clip(seed, num_samples))[None]


def their_streamed_codes(mimi: MimiModel, samples_BS: Tensor) -> Tensor:
    with torch.no_grad(), mimi.streaming(samples_BS.shape[0]):
        return torch.cat([mimi.encode(frame[:, None]) for frame in samples_BS.split(FRAME_SAMPLES, dim=1)], dim=-1)


def their_tokens(lm: LMModel, codes_BKT: Tensor, *, first_twice: bool) -> list[int]:
    """Greedy tokens of one stream. `first_twice`: as `moshi.run_inference`, which steps the first frame two times."""
    generator = LMGen(lm, use_sampling=False)
    columns = list(codes_BKT.split(1, dim=-1))
    with generator.streaming(1):
        return [int(generator.step(column)) for column in (columns[:1] if first_twice else []) + columns]


def as_message(codes_BKT: Tensor) -> np.ndarray:
    return codes_BKT[0].numpy().astype(np.int16)


def test_the_windows_of_streaming_and_of_offline_encoding_differ(their_mimi: MimiModel) -> None:
    """Otherwise both would equal both, and the next two tests could not tell ring from exact."""
    streamed, offline = their_streamed_codes(their_mimi, audio(0)), their_mimi.encode(audio(0)[:, None])
    assert torch.equal(streamed[..., :10], offline[..., :10])
    assert 0.02 < (streamed != offline).float().mean() < 0.5


@pytest.mark.parametrize("piece_frames", [1, 2, 9, 60])
@pytest.mark.parametrize("seed", range(3))
def test_ring_codes_are_their_streamed_codes(
    their_mimi: MimiModel, ring_mimi: MimiEncoder, seed: int, piece_frames: int
) -> None:
    state = ring_mimi.new_state(1, max_frames=piece_frames)
    pieces = audio(seed).split(piece_frames * FRAME_SAMPLES, dim=1)
    codes = torch.cat([ring_mimi.encode(piece, state) for piece in pieces], dim=-1)
    assert torch.equal(codes, their_streamed_codes(their_mimi, audio(seed)))


def test_ring_codes_of_a_batch(their_mimi: MimiModel, ring_mimi: MimiEncoder) -> None:
    batch = torch.cat([audio(seed) for seed in range(3)])
    assert torch.equal(ring_mimi.encode(batch), their_streamed_codes(their_mimi, batch))


@pytest.mark.parametrize("num_samples", [NUM_FRAMES * FRAME_SAMPLES, 1, 960, 1919, 5000, 40 * FRAME_SAMPLES + 777])
def test_exact_codes_are_their_offline_codes(their_mimi: MimiModel, tiny_mimi: MimiEncoder, num_samples: int) -> None:
    """They complete a last partial frame with silence, and so do we unless told otherwise."""
    samples = audio(1, num_samples)
    with torch.no_grad():
        assert torch.equal(tiny_mimi.encode(samples), their_mimi.encode(samples[:, None]))


def test_latents(their_mimi: MimiModel, tiny_checkpoint: Checkpoint) -> None:
    """What is quantized: differences too small to move one of these codes would move some of a released codebook."""
    mimi, samples = tiny_checkpoint.load_mimi(), audio(0)
    mimi.quantizer = torch.nn.Identity()
    with torch.no_grad():
        expected = their_mimi.encode_to_latent(samples[:, None], quantize=False)
    # float32 holds values of this size, up to 30, to 2e-6; two dozen layers have gone over them.
    torch.testing.assert_close(mimi.encode(samples), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_all_frames_is_run_inference(
    their_lm: LMModel, tiny_checkpoint: Checkpoint, ring_mimi: MimiEncoder, seed: int
) -> None:
    """The doubled step only fills the BOS step with codes that are not looked at; it drops the token, we keep it."""
    codes = ring_mimi.encode(audio(seed))
    ours = generate_alone(tiny_checkpoint.load_decoder(), tiny_checkpoint.speech, as_message(codes))
    assert ours == their_tokens(their_lm, codes, first_twice=True)
    assert len(ours) == NUM_FRAMES + 1
    assert len(set(ours)) > 20


@pytest.mark.parametrize("seed", range(3))
def test_bos_replaces_first_is_plain_stepping(
    their_lm: LMModel, tiny_checkpoint: Checkpoint, ring_mimi: MimiEncoder, seed: int
) -> None:
    codes = ring_mimi.encode(audio(seed))
    ours = generate_alone(
        tiny_checkpoint.load_decoder(), tiny_checkpoint.speech, as_message(codes), alignment="bos-replaces-first"
    )
    assert ours == their_tokens(their_lm, codes, first_twice=False)
    assert len(ours) == NUM_FRAMES


def test_slots_that_pause_and_change_hands(
    their_lm: LMModel, tiny_checkpoint: Checkpoint, ring_mimi: MimiEncoder
) -> None:
    """Their execution mask and row reset against our `feed` and `start`, step by step over three slots."""
    decoder, rng = tiny_checkpoint.load_decoder(), torch.Generator().manual_seed(5)
    codes = torch.cat([ring_mimi.encode(audio(seed)) for seed in range(3)])
    generator, slots = LMGen(their_lm, use_sampling=False, support_out_of_sync=True), Slots(decoder, 3)
    with generator.streaming(3):
        for step in range(50):
            active = torch.rand(3, generator=rng) < 0.7
            if step in (11, 30):  # the second slot is given to another stream, before and after its window is full
                generator.reset_streaming(torch.tensor([False, True, False]))
                slots.start(1)
            generator.set_exec_mask(active)
            theirs = generator.step(codes[..., step : step + 1])[:, 0, 0]
            for slot in active.nonzero().flatten().tolist():
                slots.feed(slot, codes[slot, :, step : step + 1])
            slots.step()
            ours = [harvest.ids.tolist() for harvest in slots.harvest(range(3))]
            assert ours == [[int(theirs[slot])] if active[slot] else [] for slot in range(3)]


def test_pauses_are_their_extra_heads(their_lm: LMModel, tiny_checkpoint: Checkpoint, ring_mimi: MimiEncoder) -> None:
    decoder, codes = tiny_checkpoint.load_decoder(), ring_mimi.encode(audio(0))
    generator, tokens, expected = LMGen(their_lm, use_sampling=False), [], []
    with generator.streaming(1):
        for column in [codes[..., :1], *codes.split(1, dim=-1)]:
            token, heads = generator.step_with_extra_heads(column)
            tokens.append(int(token))
            expected.append(torch.stack([head[0, 0, 0] for head in heads]))
    with torch.inference_mode():
        pauses = decoder.pauses(decoder.clip_hidden(torch.tensor([tokens[:-1]]), codes))[0]
    # Probabilities out of the same float32 sums in another order (a clip at once here, frame by frame there).
    torch.testing.assert_close(pauses, torch.stack(expected), atol=1e-5, rtol=0)
    assert pauses.std(dim=0).min() > 0.05


def test_a_checkpoint_of_their_tensors_is_ours(
    their_mimi: MimiModel, their_lm: LMModel, tiny_original: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Published files hold the decoding half of Mimi as well, which we step over without a word."""
    for name in ("config.json", "mimi_config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((tiny_original / name).read_bytes())
    save_file(published_names(their_lm), tmp_path / "model.safetensors")
    whole = published_names(their_mimi)
    assert any(name.startswith("decoder.") for name in whole)
    save_file(whole, tmp_path / "mimi.safetensors")
    saved = open_checkpoint(tmp_path)
    codes = saved.load_mimi().encode(audio(0))
    assert torch.equal(codes, tiny_checkpoint.load_mimi().encode(audio(0)))
    assert codes.shape == (1, NUM_CODEBOOKS, NUM_FRAMES)
    tokens = generate_alone(saved.load_decoder(), saved.speech, as_message(codes))
    assert tokens == their_tokens(their_lm, codes, first_twice=True)


def published_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """moshi 0.2.13 has new names for the attention's weights; published files have the old, which it also reads."""
    renamed = (("in_projs.0.weight", "in_proj_weight"), ("out_projs.0.weight", "out_proj.weight"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for new, old in renamed:
            name = name.replace(new, old)
        tensors[name] = tensor.clone()
    return tensors
