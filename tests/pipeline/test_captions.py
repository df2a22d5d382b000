import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions import cues, srt, vtt
from pipeline.messages import Word

CLOCK = re.compile(r"(\d{2,}):(\d\d):(\d\d)[,.](\d{3}) --> (\d{2,}):(\d\d):(\d\d)[,.](\d{3})")


def word(text: str, start: float, end: float) -> Word:
    return Word(text=text, start_seconds=start, end_seconds=end, confidence=1.0)


@st.composite
def spoken(draw: st.DrawFn) -> list[Word]:
    """Words in order, none beginning before the last one ended."""
    words: list[Word] = []
    clock = draw(st.floats(0, 4000))
    for text in draw(st.lists(st.text("abcdeé日😀<>&-", min_size=1, max_size=30))):
        start = clock + draw(st.floats(0, 3))
        clock = start + draw(st.floats(0, 2))
        words.append(word(text, start, clock))
    return words


@given(spoken())
def test_captions_hold_every_word_once_and_in_order(words: list[Word]) -> None:
    assert " ".join(cue.text for cue in cues(words)) == " ".join(one.text for one in words)


@given(spoken())
def test_captions_never_overlap_and_are_short_enough_to_read(words: list[Word]) -> None:
    made = list(cues(words))
    assert all(cue.start_seconds <= cue.end_seconds for cue in made)
    assert all(before.end_seconds <= after.start_seconds for before, after in itertools.pairwise(made))
    assert all(len(cue.text) <= 84 and cue.end_seconds - cue.start_seconds <= 7 for cue in made)


@given(spoken())
def test_both_formats_show_the_same_times(words: list[Word]) -> None:
    times = [CLOCK.findall(text) for text in (srt(words), vtt(words))]
    assert times[0] == times[1]
    assert len(times[0]) == len(list(cues(words)))
    for cue, (h1, m1, s1, ms1, *_) in zip(cues(words), times[0], strict=True):
        shown = int(h1) * 3600 + int(m1) * 60 + int(s1) + int(ms1) / 1000
        assert shown == pytest.approx(cue.start_seconds, abs=0.000_501)  # half a millisecond of rounding


def test_a_pause_ends_a_caption() -> None:
    words = [word("one", 0.0, 0.4), word("two", 0.5, 0.9), word("three", 2.0, 2.4)]
    assert [cue.text for cue in cues(words)] == ["one two", "three"]


def test_a_word_longer_than_a_caption_is_still_shown() -> None:
    assert [cue.text for cue in cues([word("a" * 200, 0.0, 9.0)])] == ["a" * 200]


def test_a_whole_subrip_file() -> None:
    words = [word("one", 0.0, 0.4), word("two", 3661.5, 3661.9999)]
    assert srt(words) == ("1\n00:00:00,000 --> 00:00:00,400\none\n\n2\n01:01:01,500 --> 01:01:02,000\ntwo\n")


def test_a_whole_webvtt_file() -> None:
    words = [word("<b>", 0.0, 0.4), word("R&D", 3.0, 3.5)]
    assert vtt(words) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.400\n&lt;b&gt;\n\n00:00:03.000 --> 00:00:03.500\nR&amp;D\n"
    )


def test_silence_makes_a_file_without_captions() -> None:
    assert srt([]) == ""
    assert vtt([]) == "WEBVTT\n"
