"""Mimi in an actor, with the loaders that feed it."""

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError

from actors.lane import LaneSettings, open_stages, packed
from actors.loader import Journey, LoadActor, Stalled
from pipeline.encode import BatchEncodeStage, EncodeStage
from pipeline.errors import SystemFailure
from pipeline.failpoints import failpoint
from pipeline.messages import Codes, Failure, Source, Waveform

_LOAD_OBJECTS = 4  # x 60 s x 96 kB = 23 MB of PCM between a loader and its encoder

LOADER_DEAD = (RayActorError, ActorUnavailableError, OutOfMemoryError, ObjectLostError)


class EncoderActor:
    """Mimi on (a share of) one GPU, fed by its own loaders. Runs as a threaded actor: one thread per open shard."""

    _loader_class = LoadActor

    def __init__(self, settings: LaneSettings) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._stage: EncodeStage | BatchEncodeStage = open_stages(settings).encode()
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ready(self) -> bool:
        """Start the loaders; answers once they are up, and the weights are loaded.

        Not in the constructor: an actor whose constructor raises over the death of its child waits for that child's
        constructor before it exits, for ever, and whoever waits for the actor does so too.

        Raises:
            SystemFailure: a loader died while starting.
        """
        failpoint("encoder.before-ready")
        for _ in range(self._settings.num_loaders):
            self._idle.put(self._new_loader())
        return True

    def encode(self, sources: Sequence[Source]) -> Iterator[list[Codes | Failure]]:
        """Stream the codes of `sources`; all shards share the stage, and its rows where it has more than one."""
        yield from packed(self._stage.run(self._waveforms(sources)))

    def _new_loader(self) -> Any:
        """A loader that is up. One that cannot start is no input's fault, so nothing may be blamed for it.

        Raises:
            SystemFailure: it died while starting.
        """
        loader_class: Any = ray.remote(self._loader_class)
        options: dict[str, Any] = {"num_cpus": self._settings.loader_cpus, "max_restarts": 0, "max_task_retries": 0}
        loader = loader_class.options(**options).remote(self._settings)
        try:
            ray.get(loader.ready.remote())
        except LOADER_DEAD as error:
            raise SystemFailure(f"a loader could not start: {error}") from None
        return loader

    def _waveforms(self, sources: Sequence[Source]) -> Iterator[Waveform | Failure]:
        """Pull from one loader; when it dies, go on with a new one where the old one stopped."""
        journey = Journey(sources)
        loader = self._idle.get()
        try:
            while journey.todo:
                try:
                    yield from self._pull(loader, journey)
                except (*LOADER_DEAD, Stalled) as error:
                    ray.kill(loader)
                    loader = self._new_loader()
                    yield from journey.blame(error)
        finally:
            self._idle.put(loader)

    def _in_time(self, objects: Any, journey: Journey) -> Iterator[Any]:
        """References to what a loader makes, as they come. Raises Stalled if none comes."""
        while True:
            seconds = journey.patience_seconds(self._settings.config.stages.load.stall_seconds)
            if not ray.wait([objects], timeout=seconds)[0]:
                raise Stalled(
                    f"its decoder gave nothing for {seconds:.0f} s, twice, and was stopped; if it plays elsewhere, "
                    "convert it or raise stages.load.stall_seconds"
                )
            try:
                reference = next(objects)
            except StopIteration:
                return
            yield reference

    def _pull(self, loader: Any, journey: "Journey") -> Iterator[Waveform | Failure]:
        options: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": _LOAD_OBJECTS}
        objects = loader.load.options(**options).remote(list(journey.todo.values()), journey.alone)
        try:
            for reference in self._in_time(objects, journey):
                for message in ray.get(reference):
                    yield from journey.arrived(message)
        except GeneratorExit:
            ray.cancel(objects)  # nobody listens any more; left alone it would decode to its end
            raise
