"""A stream's tokens depend on its codes alone; every stream comes out once; nothing is pulled before it can be used."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.config import SpeechConfig
from models.decoder import Decoder
from models.shapes import SHAPES, random_decoder
from pipeline.config import Alignment
from pipeline.generate import GenerateStage
from pipeline.messages import AudioFacts, Codes, Failure, Tokens
from tests.streams import code_pieces, failure, generate, generate_alone, interleaved
from tests.tiny import AUDIO_CARD, NUM_CODEBOOKS

SPEECH = SpeechConfig(prefix_seconds=0.0, delay_seconds=0.5, padding_id=3, word_start_id=0, hf_bos_row=300, top_k=20)
ALIGNMENTS: list[Alignment] = ["all-frames", "bos-replaces-first", "first-frame-twice"]
LENGTHS = {"a": 37, "b": 1, "c": 20, "d": 50, "e": 2, "f": 20, "g": 33}


def codes_of(name: str) -> NDArray[np.int16]:
    rng = np.random.default_rng(ord(name))
    return rng.integers(AUDIO_CARD, size=(NUM_CODEBOOKS, LENGTHS[name]), dtype=np.int16)


@pytest.fixture(scope="module", params=[*ALIGNMENTS, "sampled"])
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    """Every mode there is."""
    if request.param == "sampled":
        return {"temperature": 0.8, "seed": 5}
    return {"alignment": request.param}


@pytest.fixture(scope="module")
def expected(tiny_decoder: Decoder, options: dict[str, object]) -> dict[str, list[int]]:
    """Each stream by itself."""
    streams = [name for name in LENGTHS if not too_short(name, options)]
    made: dict[str, list[int]] = {}
    for name in streams:
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=1, **options)
        made[name] = generate(stage, code_pieces(name, codes_of(name)))[name].ids.tolist()
    return made


def too_short(name: str, options: dict[str, object]) -> bool:
    """With the first frame doubled, no stream has fewer than two columns."""
    return options.get("alignment") == "first-frame-twice" and LENGTHS[name] < 2


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
@pytest.mark.parametrize("piece_frames", [1, 7, 100])
def test_tokens_do_not_depend_on_slots_or_pieces(
    tiny_decoder: Decoder,
    options: dict[str, object],
    expected: dict[str, list[int]],
    num_slots: int,
    piece_frames: int,
) -> None:
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=num_slots, **options)
    streams = [code_pieces(n, codes_of(n), range(piece_frames, LENGTHS[n], piece_frames)) for n in expected]
    out = generate(stage, interleaved(streams, seed=num_slots))
    assert {name: tokens.ids.tolist() for name, tokens in out.items()} == expected


@pytest.mark.parametrize("bundle", [3, 32])
@pytest.mark.parametrize("lookahead", [1, 2, 4])
@pytest.mark.parametrize(("num_slots", "piece_frames"), [(1, 100), (2, 7), (3, 1), (8, 7)])
def test_tokens_do_not_depend_on_how_many_passes_run_at_once(
    tiny_decoder: Decoder,
    options: dict[str, object],
    expected: dict[str, list[int]],
    bundle: int,
    lookahead: int,
    num_slots: int,
    piece_frames: int,
) -> None:
    """Also when slots change hands before their last tokens were read, and streams end, break and wait in between."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=num_slots, lookahead=lookahead, bundle=bundle, **options)
    streams: list[list[Codes | Failure]] = [
        list(code_pieces(n, codes_of(n), range(piece_frames, LENGTHS[n], piece_frames))) for n in expected
    ]
    for index, name in enumerate(("y", "z")):
        streams.append([*code_pieces(name, codes_of("d"), [10 + 20 * index])[:1], failure(name)])
    for seed in range(2):
        out = generate(stage, interleaved(streams, seed=seed))
        assert {name: tokens.ids.tolist() for name, tokens in out.items()} == expected
        assert (stage.num_open, stage.num_waiting, stage.can_step()) == (0, 0, False)


@pytest.mark.parametrize("lookahead", [1, 4])
def test_a_stream_longer_than_the_ring_in_bundles(tiny_decoder: Decoder, lookahead: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(AUDIO_CARD, size=(NUM_CODEBOOKS, 900), dtype=np.int16)
    plain = generate_alone(tiny_decoder, SPEECH, codes)
    assert generate_alone(tiny_decoder, SPEECH, codes, bundle=32, lookahead=lookahead) == plain


def test_without_look_ahead_bundles_cost_no_pass(tiny_decoder: Decoder) -> None:
    """The end of a stream is known beforehand, so its slot changes hands although nobody has seen its last tokens."""

    def passes(bundle: int) -> tuple[int, int]:
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2, bundle=bundle)
        generate(stage, (piece for name in LENGTHS for piece in code_pieces(name, codes_of(name))))
        assert stage.slot_passes == stage.positions
        return stage.passes, stage.positions

    assert passes(1) == passes(4) == passes(32)


def test_with_look_ahead_bundles_cost_few_passes(tiny_decoder: Decoder) -> None:
    def passes(bundle: int) -> int:
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2, lookahead=4, bundle=bundle)
        generate(stage, (piece for name in LENGTHS for piece in code_pieces(name, codes_of(name))))
        return stage.passes

    assert passes(1) <= passes(32) <= passes(1) + 2 * len(LENGTHS)


def test_tokens_are_read_one_bundle_behind(tiny_decoder: Decoder) -> None:
    """The first bundle is under way when `step` returns; reading it is for the next."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=1, bundle=8)
    assert not list(stage.accept(code_pieces("a", codes_of("a"))[0]))
    assert not list(stage.step())
    assert (stage.passes, stage.positions) == (8, 0)
    assert not list(stage.step())
    assert (stage.passes, stage.positions) == (16, 8)
    out: list[Tokens | Failure] = []
    while stage.can_step():
        out += stage.step()
    assert out[0].ids.tolist() == generate_alone(tiny_decoder, SPEECH, codes_of("a"))


@given(order=st.permutations(sorted(LENGTHS)), num_slots=st.integers(1, 4), seed=st.integers(0, 99))
def test_tokens_do_not_depend_on_order(
    tiny_decoder: Decoder,
    options: dict[str, object],
    expected: dict[str, list[int]],
    order: list[str],
    num_slots: int,
    seed: int,
) -> None:
    """Of arrival, and of how the pieces of different streams interleave."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=num_slots, **options)
    streams = [code_pieces(n, codes_of(n), [LENGTHS[n] // 2]) for n in order if n in expected]
    out = generate(stage, interleaved(streams, seed=seed))
    assert {name: tokens.ids.tolist() for name, tokens in out.items()} == expected


def test_tokens_per_frame(options: dict[str, object], expected: dict[str, list[int]]) -> None:
    """F frames give F + 1, F and F tokens; for the last, the doubled frame is a column more."""
    more = {"all-frames": 1, "bos-replaces-first": 0, "first-frame-twice": -1}[options.get("alignment", "all-frames")]
    assert {name: len(ids) for name, ids in expected.items()} == {n: LENGTHS[n] + more for n in expected}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("num_frames", [0, 1, 2])
def test_the_shortest_streams(tiny_decoder: Decoder, alignment: Alignment, num_frames: int) -> None:
    """There is always a BOS step, and never a crash: what is too short for words is not for us to judge."""
    codes = codes_of("a")[:, :num_frames]
    tokens = generate_alone(tiny_decoder, SPEECH, codes, alignment=alignment)
    heard = {"all-frames": num_frames, "bos-replaces-first": num_frames - 1, "first-frame-twice": num_frames - 2}
    assert len(tokens) == 1 + max(0, heard[alignment])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("cuts", [[0], [1], [0, 1], [2], [1, 2], [1, 5, 18, 20], [19, 20], [20, 20]])
def test_the_end_may_become_known_after_everything_was_stepped(
    tiny_decoder: Decoder, alignment: Alignment, cuts: list[int]
) -> None:
    """A stream whose last piece left nothing to step was given a pass too many."""
    for num_frames in (2, 3, 20):
        codes = codes_of("c")[:, :num_frames]
        whole = generate_alone(tiny_decoder, SPEECH, codes, alignment=alignment)
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=1, alignment=alignment)
        out: list[Tokens | Failure] = []
        for piece in code_pieces("c", codes, [cut for cut in cuts if cut <= num_frames]):
            out += stage.accept(piece)
            while stage.can_step():
                out += stage.step()
        assert [message.ids.tolist() for message in out] == [whole]


@pytest.mark.parametrize("seed", range(5))
def test_a_failure_frees_its_slot_and_harms_no_other(
    tiny_decoder: Decoder, options: dict[str, object], expected: dict[str, list[int]], seed: int
) -> None:
    """Streams break before, during and after their first steps, seated or waiting; all others come out unharmed."""
    streams: list[list[Codes | Failure]] = []
    for name in expected:
        pieces: list[Codes | Failure] = list(code_pieces(name, codes_of(name), [LENGTHS[name] // 3]))
        streams.append([pieces[0], failure(name)] if name in "acg" else pieces)
    streams.append([failure("z")])
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2, **options)
    out = list(stage.run(interleaved(streams, seed)))
    assert sorted(message.source.id for message in out) == sorted([*expected, "z"])
    failed = {message.source.id for message in out if isinstance(message, Failure)}
    assert failed == {"a", "c", "g", "z"} & {*expected, "z"}
    done = {message.source.id: message.ids.tolist() for message in out if isinstance(message, Tokens)}
    assert done == {name: ids for name, ids in expected.items() if name not in failed}
    assert (stage.num_open, stage.num_waiting) == (0, 0)


def test_a_stage_can_be_used_again(tiny_decoder: Decoder, options: dict[str, object], expected: dict[str, list[int]]):
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2, **options)
    for _ in range(2):
        out = generate(stage, interleaved([code_pieces(n, codes_of(n)) for n in expected], seed=0))
        assert {name: tokens.ids.tolist() for name, tokens in out.items()} == expected


def test_nothing_is_pulled_before_it_can_be_used(tiny_decoder: Decoder) -> None:
    """With two slots and whole streams, never more than two are open: a third waits upstream, at no cost."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2)
    pulled: list[str] = []

    def inbox() -> Iterator[Codes]:
        for name in LENGTHS:
            assert stage.num_open < 2
            assert stage.num_waiting == 0
            pulled.append(name)
            yield from code_pieces(name, codes_of(name))

    done = [message.source.id for message in stage.run(inbox())]
    assert sorted(done) == pulled == sorted(LENGTHS)


def test_slots_are_kept_busy(tiny_decoder: Decoder) -> None:
    """A freed slot is taken before the next pass: two slots need little more than half the passes of one."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2)
    generate(stage, (piece for name in LENGTHS for piece in code_pieces(name, codes_of(name))))
    steps = sum(LENGTHS.values()) + len(LENGTHS)
    assert stage.slot_passes == steps
    assert stage.passes <= steps / 2 + max(LENGTHS.values()) / 2 + 1


def test_a_stream_that_has_run_dry_holds_up_nobody(tiny_decoder: Decoder) -> None:
    """Driven by `accept` and `step` as an actor does, with a neighbour whose next piece does not come."""
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2)
    slow, quick = code_pieces("a", codes_of("a"), [10]), code_pieces("c", codes_of("c"))
    assert not stage.can_step()
    assert stage.wants_input()
    for message in (slow[0], *quick):
        assert not list(stage.accept(message))
    assert not stage.wants_input()
    out: list[Tokens | Failure] = []
    while stage.can_step():
        out += stage.step()
    assert [message.source.id for message in out] == ["c"]
    assert out[0].ids.tolist() == generate_alone(tiny_decoder, SPEECH, codes_of("c"))
    assert stage.wants_input()
    assert not list(stage.step())
    assert not list(stage.accept(slow[1]))
    while stage.can_step():
        out += stage.step()
    assert out[-1].ids.tolist() == generate_alone(tiny_decoder, SPEECH, codes_of("a"))


@pytest.mark.parametrize("keep", [True, False])
def test_codes_are_kept_when_wanted(tiny_decoder: Decoder, keep: bool) -> None:
    """All of them, in every mode: also those that the decoder was not given."""
    for alignment in ALIGNMENTS:
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=1, alignment=alignment, keep_codes=keep)
        (tokens,) = generate(stage, code_pieces("a", codes_of("a"), [3, 30])).values()
        assert np.array_equal(tokens.codes, codes_of("a")) if keep else tokens.codes is None


def test_what_comes_with_the_tokens(tiny_decoder: Decoder) -> None:
    (tokens,) = generate(GenerateStage(tiny_decoder, SPEECH, num_slots=1), code_pieces("a", codes_of("a"))).values()
    assert tokens.facts == AudioFacts(duration_seconds=1.0)
    assert (tokens.ids.dtype, tokens.logprobs.dtype) == (np.dtype(np.int32), np.dtype(np.float32))
    assert tokens.ids.shape == tokens.logprobs.shape == (LENGTHS["a"] + 1,)
    assert (tokens.logprobs <= 0).all()


def test_only_one_mode_imitates_the_start_and_the_head_of_transformers(tiny_decoder: Decoder) -> None:
    """Their BOS row changes the first step; their head of one id more leaves less probability to the others."""

    def first_logprob(alignment: Alignment, bos_row: int | None) -> float:
        stage = GenerateStage(tiny_decoder, replace(SPEECH, hf_bos_row=bos_row), num_slots=1, alignment=alignment)
        return float(generate(stage, code_pieces("a", codes_of("a")))["a"].logprobs[0])

    own = first_logprob("all-frames", None)
    assert own == first_logprob("all-frames", 300) == first_logprob("bos-replaces-first", 300)
    assert own > first_logprob("first-frame-twice", None) != first_logprob("first-frame-twice", 300)


def test_sampling_is_reproduced_by_seed_and_source(tiny_decoder: Decoder) -> None:
    """The same for the same two, another for another seed, and another for another source of the same codes."""

    def sampled(name: str, seed: int) -> list[int]:
        stage = GenerateStage(tiny_decoder, SPEECH, num_slots=1, temperature=0.8, seed=seed)
        return generate(stage, code_pieces(name, codes_of("d")))[name].ids.tolist()

    assert sampled("d", 1) == sampled("d", 1)
    # Fifty tokens of spread-out distributions: that two draws agree on all of them does not happen.
    assert len({tuple(ids) for ids in (sampled("d", 1), sampled("d", 2), sampled("e", 1))}) == 3


def test_read_only_codes_are_taken(tiny_decoder: Decoder) -> None:
    """Arrays that come out of a shared object store are read only."""
    codes = codes_of("a")
    codes.setflags(write=False)
    assert generate_alone(tiny_decoder, SPEECH, codes)


def test_a_free_slot_does_not_make_a_long_stream_pile_up(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by measuring: with a slot to spare, a whole day's codes were pulled in search of a second stream."""
    monkeypatch.setattr("pipeline.generate._MAX_WAITING_FRAMES", 10)
    stage = GenerateStage(tiny_decoder, SPEECH, num_slots=2)
    rng = np.random.default_rng(0)
    codes = rng.integers(AUDIO_CARD, size=(NUM_CODEBOOKS, 900), dtype=np.int16)
    behind: list[int] = []

    def inbox() -> Iterator[Codes]:
        for index, piece in enumerate(code_pieces("a", codes, range(5, 900, 5))):
            behind.append(5 * index - stage.positions)
            yield piece

    assert len(generate(stage, inbox())["a"].ids) == 901
    assert max(behind) <= 10 + 256 + 5  # what may wait, the slot's own ring, and the piece that came last


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lookahead", [1, 4])
def test_a_gpu_gives_the_tokens_of_a_cpu(lookahead: int) -> None:
    """In float32, bundles and all."""
    plain, decoder = random_decoder(SHAPES["tiny"].decoder), random_decoder(SHAPES["tiny"].decoder, device="cuda")
    decoder.load_state_dict(plain.state_dict())
    stage = GenerateStage(decoder, SPEECH, num_slots=3, lookahead=lookahead)
    streams = [code_pieces(name, codes_of(name), range(11, LENGTHS[name], 11)) for name in LENGTHS]
    out = generate(stage, interleaved(streams, seed=0))
    assert {name: tokens.ids.tolist() for name, tokens in out.items()} == {
        name: generate_alone(plain, SPEECH, codes_of(name)) for name in LENGTHS
    }
