"""Tokens -> Transcript: text, and words with their seconds.

The decoder emits one token per frame: padding, "a word starts here", or a piece of a word. Token i belongs to audio
frame i minus prefix and delay (delayed-streams paper, section 3); modes that shift the audio against the text shift
the times back, so that a word's place does not depend on the mode.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from models.config import SpeechConfig
from models.tokenizer import WORD_MARK, Tokenizer
from pipeline.config import Alignment
from pipeline.failpoints import failpoint
from pipeline.messages import Failure, Tokens, Transcript, Word

# With plain stepping the model hears every frame one step early, with a doubled first frame one step late.
_SHIFT_FRAMES: dict[Alignment, int] = {"all-frames": 0, "bos-replaces-first": 1, "first-frame-twice": -1}

# The model marks where words start, not where they end: a word ends where the next one starts, or after this long
# where a pause follows. Kyutai's own script caps the last word alike (one second, 12.5 frames).
MAX_WORD_SECONDS = 1.0

# Of probabilities: what is beyond them differs with the number of slots, as sums are grouped differently.
_DIGITS = 4


@dataclass(slots=True)
class _Word:
    """A word being put together: the frame it starts on, its pieces and what the model thought of them."""

    frame: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class AlignStage:
    """Finds words in token streams."""

    def __init__(
        self, tokenizer: Tokenizer, speech: SpeechConfig, *, frame_rate_hz: float, alignment: Alignment = "all-frames"
    ) -> None:
        self._tokenizer, self._speech = tokenizer, speech
        self._frame_seconds = 1 / frame_rate_hz
        self._origin_seconds = speech.prefix_seconds + speech.delay_seconds
        self._shift_frames = _SHIFT_FRAMES[alignment]

    def run(self, inbox: Iterable[Tokens | Failure]) -> Iterator[Transcript | Failure]:
        """One transcript per stream; failures are passed on."""
        for message in inbox:
            yield message if isinstance(message, Failure) else self._transcript(message)

    def _transcript(self, tokens: Tokens) -> Transcript:
        failpoint("align.before-words")
        words = tuple(self._words(tokens))
        return Transcript(
            source=tokens.source,
            facts=tokens.facts,
            text=" ".join(word.text for word in words),  # decoding all at once would keep the spaces of empty words
            words=words,
            avg_logprob=self._avg_logprob(tokens),
            ids=tokens.ids,
            codes=tokens.codes,
        )

    def _avg_logprob(self, tokens: Tokens) -> float | None:
        spoken = tokens.logprobs[tokens.ids != self._speech.padding_id]
        return round(float(spoken.mean()), _DIGITS) if len(spoken) else None

    def _words(self, tokens: Tokens) -> Iterator[Word]:
        groups = [group for group in self._groups(tokens) if self._tokenizer.decode(group.ids)]
        duration = tokens.facts.duration_seconds
        latest = math.inf if duration is None else duration
        starts = [self._seconds(group.frame) for group in groups]
        for group, begun, until in zip(groups, starts, [*starts, math.inf][1:], strict=True):
            start = min(begun, latest)
            longest = max(MAX_WORD_SECONDS, len(group.ids) * self._frame_seconds)
            yield Word(
                text=self._tokenizer.decode(group.ids),
                start_seconds=start,
                end_seconds=max(start, min(until, start + longest, latest)),
                confidence=round(math.exp(sum(group.logprobs) / len(group.logprobs)), _DIGITS),
            )

    def _groups(self, tokens: Tokens) -> Iterator[_Word]:
        """Cut where the tokenizer says a word begins; it starts on the frame of the last word-start token before it.

        A word-start token inside a word, or a word without one, changes no text: joined by spaces the words are the
        transcript, whatever the model emitted.
        """
        word: _Word | None = None
        marked: int | None = None
        for frame, (token_id, logprob) in enumerate(zip(tokens.ids.tolist(), tokens.logprobs.tolist(), strict=True)):
            if token_id == self._speech.word_start_id:
                marked = frame
            if self._tokenizer.is_special(token_id):
                continue
            if word is None or self._tokenizer.piece(token_id).startswith(WORD_MARK):
                if word is not None:
                    yield word
                word = _Word(frame=frame if marked is None else marked)
            marked = None
            word.ids.append(token_id)
            word.logprobs.append(logprob)
        if word is not None:
            yield word

    def _seconds(self, frame: int) -> float:
        seconds = (frame + self._shift_frames) * self._frame_seconds - self._origin_seconds
        return round(max(0.0, seconds), 6)
