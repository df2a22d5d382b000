"""What the actors of a lane share: their orders, their reports, and how messages travel between them.

A lane is a loader or more, an encoder and a decoder, joined by pull: the decoder asks the encoder, the encoder asks a
loader. Each hop is a streaming generator with a bound on the objects not yet taken: a slow stage stops the one before.
The actor classes carry no decorator; they are wrapped where they are placed, and tests can call them plainly.

Ray never retries here (`max_restarts=0`): a replayed generator would have to yield the same objects again. A dead
loader is replaced by its encoder; when anything else dies, the driver replaces the lane and does its shards again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pipeline.config import RunConfig
from pipeline.errors import SystemFailure
from pipeline.fetch import fetch
from pipeline.load import Padding
from pipeline.messages import Codes, Failure, Source, Waveform
from pipeline.run import Stages, build_stages
from pipeline.storage import join

Message = TypeVar("Message", Waveform | Failure, Codes | Failure)

# Short files travel together, up to this much audio per object: a hop costs 0.3-0.6 ms however small the object.
_OBJECT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSettings:
    """What every actor of a lane is told when it is placed."""

    config: RunConfig
    run_id: str
    model_revision: str  # as the driver resolved it; an actor that finds another refuses to work
    padding: Padding  # loaders need this of the checkpoint, and nothing else
    num_loaders: int
    loader_cpus: float
    num_threads: int  # of torch, in the encoder and in the decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReport:
    """How a lane is doing."""

    has_room: bool
    num_finished: int  # inputs of shards that are not yet committed
    num_errors: int
    audio_seconds: float
    occupancy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """An input that was alone in a lane when the lane died or its model raised."""

    source_id: str
    died: bool
    detail: str

    def row(self, source: Source) -> Failure:
        """Its error row."""
        if self.died:
            return worker_crashed(source, stage="generate", detail=self.detail)
        return Failure(source=source, stage="generate", code="MODEL_ERROR", message=self.detail)


def worker_crashed(source: Source, *, stage: str, detail: str) -> Failure:
    """The error row of an input that kills processes."""
    message = (
        f"the process working on this input died ({detail}) with nothing else in its hands, after others had died with "
        "it; the input is left out. If it plays elsewhere, please report it"
    )
    return Failure(source=source, stage=stage, code="WORKER_CRASHED", message=message)


def mark_uri(output_uri: str, shard_id: str) -> str:
    """Where the input in hand is named while a suspect shard is done one input at a time."""
    return join(output_uri, "_kikitori", "journal", f"{shard_id}.in-hand")


def open_stages(settings: LaneSettings) -> Stages:
    """Open the checkpoint on this node, and make sure that it is the one the driver planned with."""
    config = settings.config
    fetched = fetch(config.checkpoint.model_copy(update={"revision": settings.model_revision}))
    if fetched.revision != settings.model_revision:
        raise SystemFailure(
            f"this node's copy of checkpoint {fetched.model_id} is revision {fetched.revision}, "
            f"the driver's is {settings.model_revision}"
        )
    return build_stages(config, fetched)


def packed(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Group messages into objects of about `_OBJECT_SECONDS` of audio."""
    group: list[Message] = []
    seconds = 0.0
    for message in messages:
        group.append(message)
        seconds += _audio_seconds(message)
        if seconds >= _OBJECT_SECONDS:
            yield group
            group, seconds = [], 0.0
    if group:
        yield group


def _audio_seconds(message: Waveform | Codes | Failure) -> float:
    if isinstance(message, Waveform):
        return len(message.samples) / 24_000
    if isinstance(message, Codes):
        return message.codes.shape[1] / 12.5
    return 0.1  # many failures in a row should travel too
