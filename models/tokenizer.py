"""Text token ids -> pieces and text, from a sentencepiece `.model` or a `tokenizer.json`."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as JsonTokenizer

WORD_MARK = "▁"  # what sentencepiece writes for the space before a word


class Tokenizer(Protocol):
    """What the rest of the system asks of a tokenizer; it never encodes."""

    @property
    def num_pieces(self) -> int:
        """How many ids there are."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether the id stands for no text (padding, word start, BOS, EOS, an id the model has and text has not)."""
        ...

    def piece(self, token_id: int) -> str:
        """The piece as it is stored, with `▁` where a word begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids that are not special, without leading or trailing space."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model`, as in the original repositories."""

    def __init__(self, path: Path, *, special_ids: Collection[int]) -> None:
        self._model = SentencePieceProcessor(model_file=str(path))
        markers = {self._model.bos_id(), self._model.eos_id(), self._model.pad_id(), self._model.unk_id()}
        self._special = frozenset(special_ids) | {marker for marker in markers if marker >= 0}

    @property
    def num_pieces(self) -> int:
        return self._model.get_piece_size()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special or not 0 <= token_id < self.num_pieces

    def piece(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if not self.is_special(int(i))]).strip()


class JsonFileTokenizer:
    """A `tokenizer.json`, as in the -trfs repositories."""

    def __init__(self, path: Path, *, special_ids: Collection[int]) -> None:
        self._model = JsonTokenizer.from_file(str(path))
        marked = {token_id for token_id, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._special = frozenset(special_ids) | marked

    @property
    def num_pieces(self) -> int:
        return self._model.get_vocab_size(with_added_tokens=False)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special or not 0 <= token_id < self.num_pieces

    def piece(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if not self.is_special(int(i))]
        return self._model.decode(kept, skip_special_tokens=True).strip()


def load_tokenizer(path: Path, *, special_ids: Collection[int]) -> Tokenizer:
    """Open a tokenizer file by its ending.

    Raises:
        OSError, RuntimeError, ValueError: the file is not what its ending says.
    """
    if path.suffix == ".json":
        try:
            return JsonFileTokenizer(path, special_ids=special_ids)
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception for every malformed file)
            raise ValueError(str(error)) from None
    return SentencePieceTokenizer(path, special_ids=special_ids)
