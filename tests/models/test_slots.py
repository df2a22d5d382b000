"""A slot's stream is decoded as if it were alone: slot, neighbours, predecessor and pauses do not show."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import open_checkpoint
from models.decoder import Decoder
from models.slots import Slots
from tests.tiny import AUDIO_CARD, CONTEXT, NUM_CODEBOOKS, TEXT_CARD, write_original

NUM_FRAMES = 4 * CONTEXT
ALWAYS = torch.ones(1, dtype=torch.bool)
SAMPLED = {"temperature": 0.9, "top_k": 20}


def streams(count: int, num_frames: int = NUM_FRAMES) -> Tensor:
    """Codes `[streams, K, T]`; the same first streams for any count."""
    rng = torch.Generator().manual_seed(7)
    return torch.stack([torch.randint(AUDIO_CARD, (NUM_CODEBOOKS, num_frames), generator=rng) for _ in range(count)])


def alone(decoder: Decoder, codes_KT: Tensor, *, seed: int = 0, **options: object) -> tuple[list[int], list[float]]:
    slots = Slots(decoder, 1, **options)
    slots.start(0, seed=seed)
    steps = [slots.step(codes_KT[None, :, t], ALWAYS) for t in range(codes_KT.shape[1])]
    return [int(ids) for ids, _ in steps], [float(logprobs) for _, logprobs in steps]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_together_equals_alone(tiny_decoder: Decoder, options: dict[str, float]) -> None:
    codes = streams(5)
    slots = Slots(tiny_decoder, 5, **options)
    for slot in range(5):
        slots.start(slot, seed=100 + slot)
    steps = [slots.step(codes[:, :, t], torch.ones(5, dtype=torch.bool)) for t in range(NUM_FRAMES)]
    for slot in range(5):
        ids, logprobs = alone(tiny_decoder, codes[slot], seed=100 + slot, **options)
        assert [int(step[0][slot]) for step in steps] == ids
        # Not equal bit for bit: a product of five rows groups its sums otherwise than one of one row.
        together = [float(step[1][slot]) for step in steps]
        assert together == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("slot", range(4))
def test_any_slot_is_as_good_as_any_other(tiny_decoder: Decoder, slot: int) -> None:
    codes, others = streams(1)[0], streams(4)
    slots, active = Slots(tiny_decoder, 4), torch.ones(4, dtype=torch.bool)
    others[slot] = codes
    ids = [int(slots.step(others[:, :, t], active)[0][slot]) for t in range(NUM_FRAMES)]
    assert ids == alone(tiny_decoder, codes)[0]


@pytest.mark.parametrize("used", [1, CONTEXT - 1, CONTEXT, 2 * CONTEXT + 3])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_slot_started_anew_is_a_fresh_slot(tiny_decoder: Decoder, used: int, options: dict[str, float]) -> None:
    codes = streams(3)
    slots, both = Slots(tiny_decoder, 2, **options), torch.ones(2, dtype=torch.bool)
    slots.start(0, seed=1)
    slots.start(1, seed=2)
    kept = [int(slots.step(codes[:2, :, t], both)[0][0]) for t in range(used)]
    slots.start(1, seed=3)
    new = []
    for t in range(used, NUM_FRAMES):
        ids, _ = slots.step(torch.stack([codes[0, :, t], codes[2, :, t - used]]), both)
        kept.append(int(ids[0]))
        new.append(int(ids[1]))
    assert kept == alone(tiny_decoder, codes[0], seed=1, **options)[0]
    assert new == alone(tiny_decoder, codes[2], seed=3, **options)[0][: len(new)]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_slot_that_waits_does_not_change(tiny_decoder: Decoder, options: dict[str, float]) -> None:
    """Whatever codes lie in it meanwhile, also before its BOS step and while its neighbour turns the ring."""
    codes, rng = streams(2), torch.Generator().manual_seed(3)
    slots, at, ids = Slots(tiny_decoder, 2, **options), [0, 0], ([], [])
    slots.start(0, seed=1)
    slots.start(1, seed=2)
    for step in range(3 * NUM_FRAMES):
        active = torch.tensor([step >= 20, True]) & (torch.rand(2, generator=rng) < 0.6)
        active &= torch.tensor(at) < NUM_FRAMES
        column = torch.randint(AUDIO_CARD, (2, NUM_CODEBOOKS), generator=rng)
        for slot in (0, 1):
            if active[slot]:
                column[slot] = codes[slot, :, at[slot]]
        out, _ = slots.step(column, active)
        for slot in (0, 1):
            if active[slot]:
                ids[slot].append(int(out[slot]))
                at[slot] += 1
    for slot in (0, 1):
        assert ids[slot] == alone(tiny_decoder, codes[slot], seed=slot + 1, **options)[0]


def test_seeds_make_a_difference(tiny_decoder: Decoder) -> None:
    """Sixty-four draws from spread-out distributions do not agree by chance."""
    drawn = [alone(tiny_decoder, streams(1)[0], seed=seed, **SAMPLED)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_bos_step_does_not_look_at_codes(tiny_decoder: Decoder) -> None:
    codes = streams(1)[0]
    other = codes.clone()
    other[:, 0] = 0
    assert alone(tiny_decoder, codes) == alone(tiny_decoder, other)


def test_tokens_and_their_probabilities_are_those_of_the_whole_clip(tiny_decoder: Decoder) -> None:
    """Codes of step t are those of audio frame t - 1, and what a step emits is what the next one is given."""
    codes = streams(1)[0]
    ids, logprobs = alone(tiny_decoder, codes)
    with torch.inference_mode():
        logits = tiny_decoder.clip_logits(torch.tensor([ids[:-1]]), codes[None, :, 1:])[0]
    assert logits.argmax(dim=-1).tolist() == ids
    # float32 sums in another order.
    assert logits.log_softmax(-1).amax(-1).tolist() == pytest.approx(logprobs, abs=1e-4)


def test_another_row_as_bos(tiny_decoder: Decoder) -> None:
    codes = streams(1)[0]
    assert alone(tiny_decoder, codes, bos_row=TEXT_CARD) == alone(tiny_decoder, codes)
    assert alone(tiny_decoder, codes, bos_row=300)[1] != alone(tiny_decoder, codes)[1]


def test_the_zero_logit_wins_where_all_others_are_negative(tmp_path: Path) -> None:
    decoder, codes = open_checkpoint(write_original(tmp_path, gloomy=True)).load_decoder(), streams(1)[0]
    plain, with_zero = alone(decoder, codes), alone(decoder, codes, zero_logit=True)
    first = with_zero[0].index(TEXT_CARD)
    assert TEXT_CARD not in plain[0]
    assert with_zero[0][:first] == plain[0][:first]
    assert 10 < with_zero[0].count(TEXT_CARD) < NUM_FRAMES - 10
    # One more id to share the probability with.
    assert all(a < b for a, b in zip(with_zero[1][:first], plain[1][:first], strict=True))
