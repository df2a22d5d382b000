"""Words with times -> SubRip and WebVTT captions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.messages import Word

# Two lines of 42 characters and seven seconds are what broadcasters' guidelines allow at most.
_MAX_CUE_CHARS = 84
_MAX_CUE_SECONDS = 7.0
_MAX_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Cue:
    """One caption."""

    start_seconds: float
    end_seconds: float
    text: str


def cues(words: Sequence[Word]) -> Iterator[Cue]:
    """Group words into captions; a caption ends at a pause, or when it is full."""
    group: list[Word] = []
    for word in words:
        if group and _must_break(group, word):
            yield _cue(group)
            group = []
        group.append(word)
    if group:
        yield _cue(group)


def srt(words: Sequence[Word]) -> str:
    """A whole SubRip file."""
    blocks = (
        f"{number}\n{_clock(cue.start_seconds, ',')} --> {_clock(cue.end_seconds, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(words), start=1)
    )
    return "\n".join(blocks)


def vtt(words: Sequence[Word]) -> str:
    """A whole WebVTT file."""
    blocks = (
        f"{_clock(cue.start_seconds, '.')} --> {_clock(cue.end_seconds, '.')}\n{_escape(cue.text)}\n"
        for cue in cues(words)
    )
    return "\n".join(["WEBVTT\n", *blocks])


def _must_break(group: Sequence[Word], word: Word) -> bool:
    return (
        word.start_seconds - group[-1].end_seconds > _MAX_PAUSE_SECONDS
        or word.end_seconds - group[0].start_seconds > _MAX_CUE_SECONDS
        or len(_join([*group, word])) > _MAX_CUE_CHARS
    )


def _cue(group: Sequence[Word]) -> Cue:
    return Cue(group[0].start_seconds, group[-1].end_seconds, _join(group))


def _join(group: Iterable[Word]) -> str:
    return " ".join(word.text for word in group)


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
