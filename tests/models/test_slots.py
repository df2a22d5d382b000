"""A slot's stream is decoded as if alone and one position at a time: neighbours, pauses, look-ahead do not show."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import open_checkpoint
from models.decoder import Decoder
from models.memory import Memory
from models.shapes import SHAPES, random_decoder
from models.slots import Slots
from tests.tiny import AUDIO_CARD, CONTEXT, NUM_CODEBOOKS, TEXT_CARD, write_original

NUM_FRAMES = 4 * CONTEXT
SAMPLED = {"temperature": 0.9, "top_k": 20}
LOOKAHEADS = [1, 2, 3, 4, 7, 8, 16, 32]


def streams(count: int, num_frames: int = NUM_FRAMES) -> Tensor:
    """Codes `[streams, K, T]`; the same first streams for any count."""
    rng = torch.Generator().manual_seed(7)
    return torch.stack([torch.randint(AUDIO_CARD, (NUM_CODEBOOKS, num_frames), generator=rng) for _ in range(count)])


class Decoding:
    """Streams on their way through slots; collects what each slot has emitted."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}

    def start(self, slot: int, *, seed: int = 0) -> None:
        self.slots.start(slot, seed=seed)
        self.ids[slot], self.logprobs[slot] = [], []

    def step(self) -> None:
        self.slots.step()
        for slot, harvest in zip(self.ids, self.slots.harvest(list(self.ids)), strict=True):
            self.ids[slot] += harvest.ids.tolist()
            self.logprobs[slot] += harvest.logprobs.tolist()

    def finish(self, slot: int, codes_KT: Tensor) -> None:
        """Feed the rest of a stream as there is room for it, and step until all of it is emitted."""
        total = len(self.ids[slot]) + codes_KT.shape[1]
        while len(self.ids[slot]) < total:
            count = min(self.slots.room(slot), codes_KT.shape[1])
            self.slots.feed(slot, codes_KT[:, :count])
            codes_KT = codes_KT[:, count:]
            self.step()


def alone(decoder: Decoder, codes_KT: Tensor, *, seed: int = 0, **options: object) -> tuple[list[int], list[float]]:
    decoding = Decoding(Slots(decoder, 1, **options))
    decoding.start(0, seed=seed)
    decoding.finish(0, codes_KT)
    return decoding.ids[0], decoding.logprobs[0]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_frames", [1, 2, CONTEXT + 1, NUM_FRAMES, 300])
def test_look_ahead_changes_no_token(
    tiny_decoder: Decoder, lookahead: int, options: dict[str, float], num_frames: int
) -> None:
    """300 positions are also more than the ring of audio and tokens holds."""
    codes = streams(1, num_frames)[0]
    ids, logprobs = alone(tiny_decoder, codes, seed=3, lookahead=lookahead, ring_frames=128, **options)
    plain_ids, plain_logprobs = alone(tiny_decoder, codes, seed=3, **options)
    assert ids == plain_ids
    # Not equal bit for bit: a product of many rows groups its sums otherwise than one of one row.
    assert logprobs == pytest.approx(plain_logprobs, abs=1e-4)


def test_twenty_minutes_are_as_exact_as_a_second(tiny_decoder: Decoder) -> None:
    """15,001 positions turn the rings of keys and of audio hundreds of times."""
    codes = streams(1, 15_001)[0]
    assert alone(tiny_decoder, codes, lookahead=16)[0] == alone(tiny_decoder, codes)[0]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_guesses_that_are_all_right_are_all_taken(tiny_original: Path, lookahead: int) -> None:
    decoder = open_checkpoint(tiny_original).load_decoder()
    decoder.text_head.weight.zero_()  # every logit is 0, and the lowest of equals wins
    decoding = Decoding(Slots(decoder, 1, lookahead=lookahead, padding_id=0))
    decoding.start(0)
    decoding.slots.feed(0, streams(1)[0])
    for _ in range(-(-NUM_FRAMES // lookahead)):
        decoding.step()
    assert decoding.ids[0] == [0] * NUM_FRAMES


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_guesses_that_are_all_wrong_cost_no_token(tiny_original: Path, lookahead: int) -> None:
    """Every logit is 0, so id 0 is always emitted, but a guess of padding is never right, and no prediction either."""
    decoder = open_checkpoint(tiny_original).load_decoder()
    decoder.text_head.weight.zero_()
    decoding = Decoding(Slots(decoder, 1, lookahead=lookahead, padding_id=5))
    decoding.start(0)
    decoding.slots.feed(0, streams(1)[0])
    decoding.step()
    assert decoding.ids[0] == [0]  # only the first token of the first pass is certain
    decoding.step()
    assert decoding.ids[0] == [0] * (1 + lookahead)  # now the first pass's predictions are the guesses


@pytest.mark.parametrize("lookahead", [1, 5])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_together_equals_alone(tiny_decoder: Decoder, options: dict[str, float], lookahead: int) -> None:
    codes = streams(5)
    decoding = Decoding(Slots(tiny_decoder, 5, lookahead=lookahead, **options))
    for slot in range(5):
        decoding.start(slot, seed=100 + slot)
        decoding.slots.feed(slot, codes[slot])
    for _ in range(NUM_FRAMES):
        decoding.step()
    for slot in range(5):
        ids, logprobs = alone(tiny_decoder, codes[slot], seed=100 + slot, **options)
        assert decoding.ids[slot] == ids
        assert decoding.logprobs[slot] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("lookahead", [1, 4])
def test_any_slot_is_as_good_as_any_other(tiny_decoder: Decoder, slot: int, lookahead: int) -> None:
    codes, others = streams(1)[0], streams(4)
    others[slot] = codes
    decoding = Decoding(Slots(tiny_decoder, 4, lookahead=lookahead))
    for index in range(4):
        decoding.start(index)
        decoding.slots.feed(index, others[index])
    decoding.finish(slot, codes[:, :0])
    for _ in range(NUM_FRAMES):
        decoding.step()
    assert decoding.ids[slot] == alone(tiny_decoder, codes)[0]


@pytest.mark.parametrize("used", [1, CONTEXT - 1, CONTEXT, 2 * CONTEXT + 3])
@pytest.mark.parametrize("lookahead", [1, 6])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_slot_started_anew_is_a_fresh_slot(
    tiny_decoder: Decoder, used: int, lookahead: int, options: dict[str, float]
) -> None:
    codes = streams(3)
    decoding = Decoding(Slots(tiny_decoder, 2, lookahead=lookahead, **options))
    decoding.start(0, seed=1)
    decoding.start(1, seed=2)
    decoding.slots.feed(0, codes[0])
    decoding.finish(1, codes[1, :, :used])
    decoding.start(1, seed=3)
    decoding.finish(1, codes[2])
    for _ in range(NUM_FRAMES):
        decoding.step()
    assert decoding.ids[0] == alone(tiny_decoder, codes[0], seed=1, **options)[0]
    assert decoding.ids[1] == alone(tiny_decoder, codes[2], seed=3, **options)[0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("lookahead", [1, 2, 5, 9])
def test_it_does_not_matter_when_audio_comes(tiny_decoder: Decoder, seed: int, lookahead: int) -> None:
    """A slot that waits does not change, also before its BOS step and while its neighbours turn their rings."""
    codes, rng = streams(3), random.Random(seed)
    decoding = Decoding(Slots(tiny_decoder, 3, lookahead=lookahead, ring_frames=4 * lookahead))
    fed = [0, 0, 0]
    for slot in range(3):
        decoding.start(slot, seed=slot)
    while min(len(ids) for ids in decoding.ids.values()) < NUM_FRAMES:
        slot = rng.randrange(3)
        count = rng.randint(0, min(decoding.slots.room(slot), NUM_FRAMES - fed[slot]))
        decoding.slots.feed(slot, codes[slot, :, fed[slot] : fed[slot] + count])
        fed[slot] += count
        for _ in range(rng.randrange(4)):
            decoding.step()
    for slot in range(3):
        assert decoding.ids[slot] == alone(tiny_decoder, codes[slot])[0]


def test_more_audio_than_there_is_room_for_is_refused(tiny_decoder: Decoder) -> None:
    slots = Slots(tiny_decoder, 2, lookahead=4, ring_frames=32)
    slots.start(1)
    assert slots.room(1) == 28
    with pytest.raises(ValueError, match="slot 1 has room for 28"):
        slots.feed(1, streams(1)[0][:, :29])
    with pytest.raises(ValueError, match="too short"):
        Slots(tiny_decoder, 2, lookahead=20, ring_frames=32)


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


@pytest.mark.parametrize("lookahead", [1, 3])
def test_a_pass_makes_no_state_and_moves_none(tiny_decoder: Decoder, lookahead: int) -> None:
    """A recorded pass reads and writes addresses."""
    slots = Slots(tiny_decoder, 2, lookahead=lookahead)

    def addresses() -> dict[str, int]:
        state = {name: value for name, value in vars(slots).items() if isinstance(value, Tensor)}
        cache = slots._cache
        state |= {"keys": cache.keys, "values": cache.values, "position": cache.position_B}
        return {name: tensor.data_ptr() for name, tensor in state.items()}

    before = addresses()
    slots.start(0)
    slots.feed(0, streams(1)[0])
    slots.step(3)
    slots.start(0)
    slots.harvest([0, 1])
    assert addresses() == before


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_nothing_between_reports_waits_for_the_device(options: dict[str, float], lookahead: int) -> None:
    """On the device `meta` tensors have no values, so whoever asks for one fails."""
    with torch.device("meta"):
        decoder = Decoder(SHAPES["tiny"].decoder).to(torch.bfloat16).requires_grad_(False)
    slots = Slots(decoder, 3, lookahead=lookahead, **options)
    slots.start(1, seed=7)
    slots.feed(1, streams(1)[0])
    slots.step(2)
    assert slots.may_move(1)


def test_graphs_are_for_gpus(tiny_decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="no CUDA graphs on cpu"):
        Slots(tiny_decoder, 1, use_graphs=True)


@pytest.mark.parametrize("lookahead", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_what_the_host_believes_holds(tiny_decoder: Decoder, lookahead: int, seed: int) -> None:
    """Passes, audio and new streams at random, reports read late: the device is always between the bounds."""
    rng, codes = random.Random(seed), streams(3)
    slots = Slots(tiny_decoder, 3, lookahead=lookahead)
    reports = []
    for _ in range(60):
        slot = rng.randrange(3)
        if rng.random() < 0.1:
            slots.start(slot)
        slots.feed(slot, codes[slot, :, : min(rng.randrange(12), slots.room(slot))])
        slots.step(rng.randrange(4))
        reports.append(slots.report())
        if len(reports) > rng.randrange(4):
            slots.read(reports.pop(0))
        for index, position in enumerate(slots._cache.position_B.tolist()):
            tenant = slots._tenants[index]
            assert tenant.least <= position <= tenant.most <= tenant.num_fed
            assert lookahead > 1 or tenant.least == tenant.most
            assert slots.may_move(index) >= (position < tenant.num_fed)


def test_reports_say_what_was_and_to_whom_it_belonged(tiny_decoder: Decoder) -> None:
    """Read after the slot was given away: the old stream's tokens, then the new one's; no token twice, none lost."""
    codes = streams(2)
    slots = Slots(tiny_decoder, 2)
    slots.start(0)
    slots.feed(0, codes[0, :, :20])
    slots.step(8)
    first = slots.report()
    slots.step(12)
    assert not slots.may_move(0)
    second = slots.report()
    slots.start(0)
    slots.feed(0, codes[1, :, :9])
    slots.step(9)
    third = slots.report()
    parts = [slots.read(report)[0] for report in (first, second, third)]
    assert [len(part.ids) for part in parts] == [part.num_moves for part in parts] == [8, 12, 9]
    assert [*parts[0].ids, *parts[1].ids] == alone(tiny_decoder, codes[0, :, :20])[0]
    assert parts[2].ids.tolist() == alone(tiny_decoder, codes[1, :, :9])[0]
    assert len(slots.harvest([0])[0].ids) == 0


def test_how_far_one_need_not_look(tiny_decoder: Decoder) -> None:
    slots = Slots(tiny_decoder, 2, lookahead=4, ring_frames=256)
    for slot, length in enumerate((40, 19)):
        slots.feed(slot, streams(1)[0][:, :length])
    assert slots.num_passes_until_news([0], at_most=32) == 10
    assert slots.num_passes_until_news([0, 1], at_most=32) == 4
    assert slots.num_passes_until_news([0, 1], at_most=2) == 2
    slots.step(5)
    assert slots.num_ahead(1) == 0
    assert slots.num_passes_until_news([0, 1], at_most=32) == 1
    assert slots.may_move(1)  # as far as anybody knows
    slots.read(slots.report())
    assert slots.num_ahead(0) >= 20


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_gpu_gives_the_tokens_of_a_cpu(lookahead: int, use_graphs: bool, options: dict[str, float]) -> None:
    """In float32, with whatever kernels are there, over several turns of the rings and two streams per slot."""
    codes, config = streams(4, 200), SHAPES["tiny"].decoder
    weights = random_decoder(config).state_dict()
    decoder = random_decoder(config, device="cuda")
    decoder.load_state_dict(weights)
    slots = Slots(decoder, 2, lookahead=lookahead, use_graphs=use_graphs, ring_frames=256, **options)
    got: list[list[int]] = []
    for pair in (codes[:2], codes[2:]):
        for slot in range(2):
            slots.start(slot, seed=5)
            slots.feed(slot, pair[slot])
        slots.step(200)
        got += [harvest.ids.tolist() for harvest in slots.harvest(range(2))]
    assert got == [alone(random_decoder(config), stream, seed=5, **options)[0] for stream in codes]


@pytest.mark.parametrize("lookahead", [1, 4])
def test_on_a_cpu_slots_that_stand_still_cost_nothing(lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows stay even for one stream without look-ahead: a product of one row has other last bits."""
    decoder = random_decoder(SHAPES["tiny"].decoder)
    slots = Slots(decoder, 8, lookahead=lookahead)
    rows: list[int] = []
    hidden = decoder.hidden

    def counting(x_BTD: torch.Tensor, memory: Memory) -> torch.Tensor:
        rows.append(x_BTD.shape[0])
        return hidden(x_BTD, memory)

    monkeypatch.setattr(decoder, "hidden", counting)
    codes = torch.randint(64, (8, 40), generator=torch.Generator().manual_seed(0))
    for slot in (5, 2):
        slots.start(slot)
        slots.feed(slot, codes[:, : 10 * slot - 10])
    for _ in range(60):
        slots.step()
        slots.harvest(range(8))
    assert set(rows) == ({2} if lookahead == 1 else {2, 1})
    assert len(rows) <= 40
