import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from pipeline import messages
from pipeline.messages import (
    AudioFacts,
    Codes,
    Failure,
    ParquetRow,
    Segment,
    Shard,
    ShardRef,
    Source,
    TarMember,
    Tokens,
    Transcript,
    Waveform,
    Word,
)

SOURCE = Source(id="1", uri="a.wav", size_bytes=5)
MEMBER = TarMember(file_uri="a.tar", file_version="1", name="a#b.wav", offset_bytes=512)
ROW = ParquetRow(file_uri="a.parquet", file_version="1", column="audio", row=3)
SEGMENT = Segment(file_uri="a.wav", start_seconds=1.5, duration_seconds=None)
FACTS = AudioFacts(content_sha256="ab", duration_seconds=1.5, sampling_rate_hz=8000, channels=2)
WORD = Word(text="one", start_seconds=0.0, end_seconds=0.5, confidence=0.9)
IDS = np.arange(3, dtype=np.int32)
CODES = np.arange(6, dtype=np.int16).reshape(2, 3)
EXAMPLES: list[Any] = [
    SOURCE,
    MEMBER,
    ROW,
    SEGMENT,
    ShardRef(
        id="s",
        num_inputs=1,
        estimated_seconds=1.5,
        longest_seconds=1.5,
        manifest_uri="plan-00000.manifest",
        first_row=0,
    ),
    Shard(id="s", sources=(SOURCE,), estimated_seconds=1.5),
    FACTS,
    Waveform(source=SOURCE, samples=np.zeros(4, np.float32), is_last=True, facts=FACTS),
    Codes(source=SOURCE, codes=CODES, is_last=False),
    Tokens(source=SOURCE, facts=FACTS, ids=IDS, logprobs=np.zeros(3, np.float32), codes=CODES),
    WORD,
    Transcript(source=SOURCE, facts=FACTS, text="one", words=(WORD,), avg_logprob=-0.1, ids=IDS),
    Failure(source=SOURCE, stage="load", code="NOT_FOUND", message="gone"),
]


def test_every_kind_of_message_is_an_example_here() -> None:
    kinds = {kind for kind in vars(messages).values() if dataclasses.is_dataclass(kind)}
    assert kinds == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_cannot_be_changed_or_grow(message: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, dataclasses.fields(message)[0].name, None)
    assert not hasattr(message, "__dict__")
    with pytest.raises(TypeError):
        type(message)(*(getattr(message, field.name) for field in dataclasses.fields(message)))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_in_another_process_as_it_left(message: Any) -> None:
    again = pickle.loads(pickle.dumps(message))
    for field in dataclasses.fields(message):
        np.testing.assert_equal(getattr(again, field.name), getattr(message, field.name))
        if isinstance(getattr(message, field.name), np.ndarray):
            assert getattr(again, field.name).dtype == getattr(message, field.name).dtype


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_can_be_compared_and_hashed(message: Any) -> None:
    """Arrays compare to arrays: what holds one compares by identity, or `==` would raise."""
    holds_array = any(isinstance(getattr(message, field.name), np.ndarray) for field in dataclasses.fields(message))
    again = pickle.loads(pickle.dumps(message))
    assert (message == again) is not holds_array
    assert len({message, message, again}) == (2 if holds_array else 1)


@pytest.mark.parametrize("place", [MEMBER, ROW, SEGMENT])
def test_what_is_opened_is_never_read_from_the_uri_for_people(place: TarMember | ParquetRow | Segment) -> None:
    assert SOURCE.file_uri == "a.wav"
    assert Source(id="1", uri="a#b#c", place=place).file_uri == place.file_uri
