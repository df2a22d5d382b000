"""Cutting audio and codes into the messages that stages exchange, and the shortest way through one stage."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.config import SpeechConfig
from models.decoder import Decoder
from pipeline.generate import GenerateStage
from pipeline.messages import AudioFacts, Codes, Failure, Source, Tokens, Waveform

Message = TypeVar("Message")


def source(name: str) -> Source:
    """An input of this id."""
    return Source(id=name, uri=f"memory://{name}")


def failure(name: str) -> Failure:
    """The end of a stream that broke."""
    return Failure(source=source(name), stage="load", code="DECODE_FAILED", message="cut short")


def waveform_pieces(name: str, samples: NDArray[np.float32], cuts: Sequence[int] = ()) -> list[Waveform]:
    """One stream's audio, cut at the given sample positions."""
    pieces = np.split(samples, sorted(cuts))
    return [
        Waveform(source=source(name), samples=piece, is_last=last, facts=_facts(last))
        for piece, last in _with_last(pieces)
    ]


def code_pieces(name: str, codes_KT: NDArray[np.int16], cuts: Sequence[int] = ()) -> list[Codes]:
    """One stream's codes, cut before the given frames."""
    pieces = np.split(codes_KT, sorted(cuts), axis=1)
    return [
        Codes(source=source(name), codes=piece, is_last=last, facts=_facts(last)) for piece, last in _with_last(pieces)
    ]


def interleaved(streams: Sequence[Sequence[Message]], seed: int) -> Iterator[Message]:
    """All messages of all streams in a random order that keeps each stream's own."""
    rng, queues = random.Random(seed), [list(stream) for stream in streams if stream]
    while queues:
        queue = rng.choice(queues)
        yield queue.pop(0)
        queues = [queue for queue in queues if queue]


def generate(stage: GenerateStage, messages: Iterable[Codes | Failure]) -> dict[str, Tokens]:
    """What a stage makes of the messages, failures left out, by source id."""
    return {out.source.id: out for out in stage.run(messages) if isinstance(out, Tokens)}


def generate_alone(decoder: Decoder, speech: SpeechConfig, codes_KT: NDArray[np.int16], **options: Any) -> list[int]:
    """The tokens of one stream that has the decoder to itself."""
    stage = GenerateStage(decoder, speech, num_slots=1, **options)
    return generate(stage, code_pieces("alone", codes_KT))["alone"].ids.tolist()


def _facts(is_last: bool) -> AudioFacts | None:
    return AudioFacts(duration_seconds=1.0) if is_last else None


def _with_last(pieces: Sequence[Message]) -> list[tuple[Message, bool]]:
    return [(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
