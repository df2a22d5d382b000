"""Both kinds of tokenizer give the same pieces and the same text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import WORD_MARK, Tokenizer, load_tokenizer
from tests.tiny import sentencepiece_model, write_json_tokenizer

NUM_PIECES = 320  # four markers, 256 bytes, sixty pieces
SPECIAL = {0, 3}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Of the same pieces, bytes among them, as in the released tokenizers."""
    folder, model = tmp_path_factory.mktemp("tokenizer"), sentencepiece_model(NUM_PIECES, byte_fallback=True)
    (folder / "tokenizer.model").write_bytes(model)
    write_json_tokenizer(folder / "tokenizer.json", model)
    return (
        load_tokenizer(folder / "tokenizer.model", special_ids=SPECIAL),
        load_tokenizer(folder / "tokenizer.json", special_ids=SPECIAL),
    )


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    where = {tokenizer.piece(i): i for i in range(tokenizer.num_pieces)}
    return [where[piece] for piece in pieces]


def as_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    return ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in text.encode()))


def test_both_have_the_same_pieces(both: tuple[Tokenizer, Tokenizer]) -> None:
    first, second = both
    assert first.num_pieces == second.num_pieces == NUM_PIECES
    assert [first.piece(i) for i in range(NUM_PIECES)] == [second.piece(i) for i in range(NUM_PIECES)]
    outside = range(-2, NUM_PIECES + 3)
    assert [first.is_special(i) for i in outside] == [second.is_special(i) for i in outside]


def test_what_is_special(both: tuple[Tokenizer, Tokenizer]) -> None:
    """Unknown (word start), BOS, EOS, padding, and ids that the model has and the text has not."""
    for tokenizer in both:
        assert [i for i in range(-1, NUM_PIECES + 2) if tokenizer.is_special(i)] == [
            -1, 0, 1, 2, 3, NUM_PIECES, NUM_PIECES + 1,
        ]  # fmt: skip


@given(ids=st.lists(st.integers(0, NUM_PIECES), max_size=30))
def test_both_say_the_same_of_text_pieces(both: tuple[Tokenizer, Tokenizer], ids: list[int]) -> None:
    first, second = both
    pieces = [i for i in ids if not first.piece(min(i, NUM_PIECES - 1)).startswith("<0x")]
    assert first.decode(pieces) == second.decode(pieces)


@given(ids=st.lists(st.integers(0, NUM_PIECES), max_size=30))
def test_special_ids_say_nothing(both: tuple[Tokenizer, Tokenizer], ids: list[int]) -> None:
    for tokenizer in both:
        assert tokenizer.decode(ids) == tokenizer.decode([i for i in ids if not tokenizer.is_special(i)])
        assert tokenizer.decode(ids) == tokenizer.decode(ids).strip()


@pytest.mark.parametrize("text", ["é", "日本", "🎤", "naïve café"])
def test_bytes_become_characters(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    for tokenizer in both:
        assert tokenizer.decode(as_bytes(tokenizer, text)) == text


def test_broken_bytes_do_not_raise(both: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in both:
        assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(as_bytes(tokenizer, "日")[:2])


def test_words_join_with_single_spaces(both: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in both:
        words = [[f"{WORD_MARK}fox"], [f"{WORD_MARK}", "y"], [f"{WORD_MARK}lazy", "s"]]
        ids = [ids_of(tokenizer, *word) for word in words]
        assert tokenizer.decode([i for word in ids for i in word]) == "fox y lazys"
        assert [tokenizer.decode(word) for word in ids] == ["fox", "y", "lazys"]


def test_nothing_says_nothing(both: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in both:
        assert tokenizer.decode([]) == tokenizer.decode([3, 3, 0, 3]) == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("nothing")
    with pytest.raises((OSError, RuntimeError, ValueError)):
        load_tokenizer(tmp_path / name, special_ids=SPECIAL)
