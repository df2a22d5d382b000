"""Lengths are those that the mixes promise, and only speech is credited."""

import numpy as np
import pytest

from models.shapes import SHAPES
from pipeline.load import TAIL_MARGIN_SECONDS, Padding
from pipeline.workload import MIXES, Workload, make_workload, noise, random_clips

LARGE = SHAPES["2.6b"]
TINY = SHAPES["tiny"]


def work(mix: str, num_clips: int = 50, **options: float) -> Workload:
    return make_workload(mix, num_clips=num_clips, speech=LARGE.speech, frame_rate_hz=12.5, **options)


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_seed_makes_the_same_clips(mix: str) -> None:
    assert work(mix) == work(mix)
    assert len(work(mix).speech_seconds) == 50


@pytest.mark.parametrize(("mix", "seconds"), [("2.5s", 2.5), ("30s", 30.0), ("1h", 3600.0)])
def test_fixed_lengths(mix: str, seconds: float) -> None:
    assert set(work(mix).speech_seconds) == {seconds}


def test_librispeech_is_seven_seconds_on_average() -> None:
    lengths = np.array(work("librispeech", 5000).speech_seconds)
    assert lengths.min() >= 1.3
    assert lengths.max() <= 35
    assert 7.0 < lengths.mean() < 7.8
    assert 5.0 < np.median(lengths) < 7.0  # skewed, as real ones are


def test_speech_alone_is_credited() -> None:
    """2.5 s of speech, 1 s before and 3.5 s after: 87.5 frames, of which 87 are whole."""
    clips = work("2.5s", 4)
    assert clips.credited_seconds == 10.0
    assert clips.num_frames == (87,) * 4
    assert clips.step_seconds == 4 * 87 / 12.5


def test_frames_are_those_of_the_load_stage() -> None:
    clips = work("librispeech", 200)
    padding = Padding(prefix_seconds=1.0, delay_seconds=2.5)
    assert clips.padding_seconds == 1.0 + 2.5 + TAIL_MARGIN_SECONDS
    expected = [padding.num_frames(round(seconds * 24_000)) for seconds in clips.speech_seconds]
    assert list(clips.num_frames) == expected


def test_clips_can_be_cut_shorter() -> None:
    assert set(work("1h", longest_seconds=12.0).speech_seconds) == {12.0}


def test_the_first_clips_of_a_workload() -> None:
    clips = work("30s")
    assert len(clips.first(100.0).speech_seconds) == 2  # of 34.5 s each
    assert len(clips.first(1.0).speech_seconds) == 1
    assert clips.first(1e9) == clips


def test_codes_have_the_lengths_of_the_clips() -> None:
    clips = make_workload("librispeech", num_clips=5, speech=TINY.speech, frame_rate_hz=12.5)
    coded = random_clips(clips, mimi=TINY.mimi)
    assert [codes.shape for codes in coded.codes] == [(8, num) for num in clips.num_frames]
    assert max(codes.max() for codes in coded.codes) == 63
    assert coded.credited_seconds == clips.credited_seconds
    assert coded.step_seconds == clips.step_seconds


def test_noise_is_padded_with_silence() -> None:
    clips = make_workload("2.5s", num_clips=2, speech=LARGE.speech, frame_rate_hz=12.5)
    first, second = noise(clips, mimi=LARGE.mimi, prefix_seconds=1.0)
    assert len(first.samples) == 87 * 1920
    assert first.is_last
    assert first.facts is not None
    assert first.facts.duration_seconds == 2.5
    assert not first.samples[:24_000].any()
    assert first.samples[24_000:84_000].all()
    assert not first.samples[84_000:].any()
    assert np.abs(first.samples).max() < 1
    assert not np.array_equal(first.samples, second.samples)
