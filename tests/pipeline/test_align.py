"""Words and their seconds: nothing that was emitted is lost, and nothing comes before or after the file."""

import json
import math
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.checkpoint import Checkpoint, open_checkpoint
from models.config import SpeechConfig
from models.tokenizer import Tokenizer, load_tokenizer
from pipeline.align import AlignStage
from pipeline.config import Alignment
from pipeline.generate import GenerateStage
from pipeline.messages import AudioFacts, Tokens, Transcript
from tests.streams import code_pieces, failure, generate, interleaved, source
from tests.tiny import sentencepiece_model

NUM_PIECES = 320
SPEECH = SpeechConfig(prefix_seconds=1.0, delay_seconds=2.5, padding_id=3, word_start_id=0)
ORIGIN_FRAMES = 3.5 * 12.5
ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "tests" / "data" / "speech"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("align") / "tokenizer.model"
    path.write_bytes(sentencepiece_model(NUM_PIECES, byte_fallback=True))
    return load_tokenizer(path, special_ids={0, 3})


def align(
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    duration: float | None = 60.0,
    alignment: Alignment = "all-frames",
    logprobs: list[float] | None = None,
) -> Transcript:
    stage = AlignStage(tokenizer, SPEECH, frame_rate_hz=12.5, alignment=alignment)
    tokens = Tokens(
        source=source("a"),
        facts=AudioFacts(duration_seconds=duration),
        ids=np.asarray(ids, dtype=np.int32),
        logprobs=np.asarray([-0.5] * len(ids) if logprobs is None else logprobs, dtype=np.float32),
    )
    (transcript,) = stage.run([tokens])
    assert isinstance(transcript, Transcript)
    return transcript


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    where = {tokenizer.piece(i): i for i in range(NUM_PIECES)} | {"PAD": 3, "WORD": 0}
    return [where[piece] for piece in pieces]


# Random ids lean towards what a model emits, and hold all that it could: bytes, bare word marks, foreign ids.
TOKENS = st.lists(
    st.one_of(st.sampled_from([0, 3, 3]), st.integers(260, NUM_PIECES - 1), st.integers(0, NUM_PIECES + 2)), max_size=60
)


@given(ids=TOKENS)
def test_words_joined_by_spaces_are_the_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    transcript = align(tokenizer, ids)
    assert " ".join(word.text for word in transcript.words) == transcript.text
    assert all(word.text and word.text == word.text.strip() for word in transcript.words)


@given(ids=TOKENS)
def test_no_character_is_lost(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Up to white space, the text is what the tokenizer makes of all ids at once."""
    assert align(tokenizer, ids).text.split() == tokenizer.decode(ids).split()


@given(
    ids=TOKENS,
    duration=st.one_of(st.none(), st.floats(0, 6)),
    alignment=st.sampled_from(["all-frames", "bos-replaces-first", "first-frame-twice"]),
)
def test_times_are_in_order_and_within_the_file(
    tokenizer: Tokenizer, ids: list[int], duration: float | None, alignment: Alignment
) -> None:
    words = align(tokenizer, ids, duration=duration, alignment=alignment).words
    starts = [word.start_seconds for word in words]
    assert starts == sorted(starts)
    for word in words:
        assert 0 <= word.start_seconds <= word.end_seconds <= (math.inf if duration is None else duration)
    for word, following in pairwise(words):
        assert word.end_seconds <= max(following.start_seconds, word.start_seconds)


def test_a_word_starts_at_its_mark_less_prefix_and_delay(tokenizer: Tokenizer) -> None:
    ids = [3] * 50 + ids_of(tokenizer, "WORD", "▁fox", "PAD", "WORD", "PAD", "▁dog", "s")
    words = align(tokenizer, ids).words
    assert [word.text for word in words] == ["fox", "dogs"]
    assert words[0].start_seconds == pytest.approx((50 - ORIGIN_FRAMES) / 12.5)
    assert words[1].start_seconds == pytest.approx((53 - ORIGIN_FRAMES) / 12.5)
    assert words[0].end_seconds == words[1].start_seconds


def test_a_word_before_a_pause_is_cut_off(tokenizer: Tokenizer) -> None:
    """The model marks no ends: a word lasts a second at most, or as long as its pieces came."""
    long_word = ["▁quartz", *["s"] * 19]
    ids = [3] * 50 + ids_of(tokenizer, "WORD", "▁fox") + [3] * 40 + ids_of(tokenizer, "WORD", *long_word) + [3] * 40
    short, long = align(tokenizer, ids).words
    assert short.end_seconds - short.start_seconds == pytest.approx(1.0)
    assert long.end_seconds - long.start_seconds == pytest.approx(20 / 12.5)


@pytest.mark.parametrize(
    ("alignment", "frames"), [("all-frames", 0), ("bos-replaces-first", 1), ("first-frame-twice", -1)]
)
def test_the_mode_shifts_tokens_not_times(tokenizer: Tokenizer, alignment: Alignment, frames: int) -> None:
    """A token at place i of a mode that hears everything so many frames early stands for place i plus that many."""
    words = ids_of(tokenizer, "WORD", "▁fox", "PAD", "WORD", "▁dog")
    expected = align(tokenizer, [3] * 60 + words).words
    shifted = align(tokenizer, [3] * (60 - frames) + words, alignment=alignment).words
    assert shifted == expected


def test_words_without_characters_leave_no_space(tokenizer: Tokenizer) -> None:
    """A lone word mark, or a space spelt as a byte, used to leave two spaces in the text and one between the words."""
    for gap in ("▁", "<0x20>", "<0x09>"):
        assert align(tokenizer, ids_of(tokenizer, "▁fox", gap, "▁dog")).text == "fox dog"


def test_padding_is_silence(tokenizer: Tokenizer) -> None:
    for ids in ([], [3] * 30, [3, 0, 3, 0]):
        transcript = align(tokenizer, ids)
        assert (transcript.text, transcript.words) == ("", ())
    assert align(tokenizer, [3] * 30).avg_logprob is None


def test_text_before_the_first_mark_is_kept(tokenizer: Tokenizer) -> None:
    """Kyutai's own script loses it."""
    transcript = align(tokenizer, [3] * 50 + ids_of(tokenizer, "▁fox", "s", "WORD", "▁dog"))
    assert transcript.text == "foxs dog"
    assert transcript.words[0].start_seconds == pytest.approx((50 - ORIGIN_FRAMES) / 12.5)


def test_a_first_piece_without_a_mark_of_its_own_is_a_word(tokenizer: Tokenizer) -> None:
    assert align(tokenizer, ids_of(tokenizer, "s", "▁fox")).text == "s fox"


def test_a_word_without_a_mark_starts_at_its_first_piece(tokenizer: Tokenizer) -> None:
    """The mark before an earlier word is used up."""
    words = align(tokenizer, [3] * 50 + ids_of(tokenizer, "WORD", "▁fox", "PAD", "PAD", "▁dog")).words
    assert words[1].start_seconds == pytest.approx((54 - ORIGIN_FRAMES) / 12.5)


def test_a_mark_within_a_word_does_not_split_it(tokenizer: Tokenizer) -> None:
    ids = [3] * 50 + ids_of(tokenizer, "WORD", "▁fox", "WORD", "s", "▁dog")
    assert [word.text for word in align(tokenizer, ids).words] == ["foxs", "dog"]


def test_confidence_and_mean_log_probability(tokenizer: Tokenizer) -> None:
    """Of a word: the geometric mean over its pieces. Of the stream: over all that is not padding, marks included."""
    ids = ids_of(tokenizer, "PAD", "WORD", "▁fox", "PAD", "s")
    transcript = align(tokenizer, ids, logprobs=[-9.0, -0.3, -1.0, -9.0, -2.0])
    assert transcript.words[0].confidence == pytest.approx(math.exp(-1.5), abs=5e-5)  # four digits
    assert transcript.avg_logprob == pytest.approx(-1.1)


def test_failures_and_everything_else_pass_through(tokenizer: Tokenizer) -> None:
    stage = AlignStage(tokenizer, SPEECH, frame_rate_hz=12.5)
    codes = np.zeros((8, 2), np.int16)
    ids = np.array([3, 3], np.int32)
    tokens = Tokens(
        source=source("b"), facts=AudioFacts(channels=2), ids=ids, logprobs=np.zeros(2, np.float32), codes=codes
    )
    broken, made = stage.run([failure("a"), tokens])
    assert broken == failure("a")
    assert isinstance(made, Transcript)
    assert (made.source, made.facts, made.ids, made.codes) == (tokens.source, tokens.facts, ids, codes)


# The demo checkpoint on real, if synthetic, speech: its tokens were made with transformers, before this code existed.


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(ROOT / "models" / "demo" / "original")


def padded_clip(path: Path, speech: SpeechConfig) -> NDArray[np.float32]:
    """16 bit mono at 24 kHz, a second more than the delay behind it, as transformers' feature extractor does."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / np.float32(32768)
    after = int((speech.delay_seconds + 1.0) * 24000)
    padded = np.concatenate([pcm, np.zeros(after, np.float32)])
    return padded[: len(padded) // 1920 * 1920]


def test_the_demo_hears_the_digits(demo: Checkpoint) -> None:
    """Sixteen clips over five slots: the tokens that transformers gave, and the words at their places."""
    clips = json.loads((DIGITS / "digits_expected.json").read_text())
    mimi, tokenizer = demo.load_mimi(), demo.load_tokenizer()
    streams = []
    for clip in clips:
        samples = torch.from_numpy(padded_clip(DIGITS / clip["file"], demo.speech))[None]
        codes = mimi.encode(samples)[0].numpy().astype(np.int16)
        streams.append(code_pieces(clip["file"], codes, range(10, codes.shape[1], 10)))
    stage = GenerateStage(demo.load_decoder(), demo.speech, num_slots=5)
    tokens = generate(stage, interleaved(streams, seed=0))
    align_stage = AlignStage(tokenizer, demo.speech, frame_rate_hz=12.5)
    assert len(clips) == len(tokens) == 16
    for clip in clips:
        mine = tokens[clip["file"]]
        assert mine.ids[: len(clip["tokens"])].tolist() == clip["tokens"]
        assert len(mine.ids) == len(clip["tokens"]) + 1
        (transcript,) = align_stage.run([mine])
        assert isinstance(transcript, Transcript)
        assert transcript.text == clip["hyp"]
