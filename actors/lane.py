"""What the actors of a lane share: their orders, their reports, and how messages travel between them.

A lane is a loader or more, an encoder and a decoder, joined by pull: the decoder asks the encoder, the encoder asks a
loader. Each hop is a streaming generator with a bound on the objects not yet taken: a slow stage stops the one before.
The actor classes carry no decorator; they are wrapped where they are placed, and tests can call them plainly.

Ray never retries here (`max_restarts=0`): a replayed generator would have to yield the same objects again. A dead
loader is replaced by its encoder; when anything else dies, the driver replaces the lane and does its shards again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.config import RunConfig
from pipeline.errors import SystemFailure
from pipeline.fetch import fetch
from pipeline.load import Padding
from pipeline.messages import Codes, Failure, Shard, Source, Waveform
from pipeline.run import Stages, build_stages

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
    conditional_puts: bool = True  # whether the output's store can refuse to replace a file, as the driver found out


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """How far a shard is that is open in a lane."""

    shard_id: str
    num_finished: int  # inputs, of those to be done
    errors: Mapping[str, int]  # error code -> inputs
    example: str | None  # one of the errors, for people
    audio_seconds: float  # of those that are ok

    @property
    def num_errors(self) -> int:
        """Finished inputs that are errors."""
        return sum(self.errors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReport:
    """How a lane is doing."""

    has_room: bool
    occupancy: float
    shards: tuple[ShardReport, ...]  # those that are not yet committed

    @property
    def num_finished(self) -> int:
        """Inputs."""
        return sum(shard.num_finished for shard in self.shards)

    @property
    def num_errors(self) -> int:
        """Of the finished inputs."""
        return sum(shard.num_errors for shard in self.shards)

    @property
    def audio_seconds(self) -> float:
        """Of the finished inputs that are ok."""
        return sum(shard.audio_seconds for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """An input that was alone in a lane when the lane died or its model raised."""

    source_id: str
    died: bool
    detail: str

    @property
    def code(self) -> str:
        """Of its error row."""
        return "WORKER_CRASHED" if self.died else "MODEL_ERROR"

    def row(self, source: Source) -> Failure:
        """Its error row."""
        if self.died:
            return worker_crashed(source, stage="generate", detail=self.detail)
        return Failure(source=source, stage="generate", code=self.code, message=self.detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a lane is told to do with a shard."""

    shard: Shard
    culprits: tuple[Culprit, ...]  # they get their error row without being touched
    retry_codes: frozenset[str]  # of a part that is there, the inputs to be done again


def worker_crashed(source: Source, *, stage: str, detail: str) -> Failure:
    """The error row of an input that kills processes."""
    message = (
        f"the process working on this input died ({detail}) with nothing else in its hands, after others had died with "
        "it; the input is left out. If it plays elsewhere, please report it"
    )
    return Failure(source=source, stage=stage, code="WORKER_CRASHED", message=message)


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
