"""The generate stage on a thread of its own: an inbox in front, a callback per stream behind. No Ray in here.

An event loop must not be blocked by a pass over the weights, and a pass must not wait for an event loop.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from pipeline.align import AlignStage
from pipeline.errors import ModelFailure
from pipeline.generate import GenerateStage
from pipeline.messages import Codes, Failure, Tokens, Transcript

Result = Transcript | Failure
Deliver = Callable[[Result], None]

# How long the thread sleeps at most when no stream can move; a message wakes it at once.
_IDLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Open:
    """An order to expect a stream."""

    source_id: str
    deliver: Deliver


class GenerateHost:
    """Owns the stage: everything that touches it happens on one thread.

    Args:
        stage: the decoder and its slots.
        align: turns finished token streams into transcripts.
        on_death: called once, on the thread, with what ended it.
    """

    def __init__(self, stage: GenerateStage, align: AlignStage, *, on_death: Callable[[ModelFailure], None]) -> None:
        self._stage, self._align, self._on_death = stage, align, on_death
        self._inbox: queue.SimpleQueue[_Open | Codes | Failure | None] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._death: ModelFailure | None = None
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def expect(self, source_id: str, deliver: Deliver) -> None:
        """Announce a stream; `deliver` is called once with its result, on the host's thread."""
        self._inbox.put(_Open(source_id, deliver))

    def put(self, messages: Iterable[Codes | Failure]) -> None:
        """Hand in pieces of announced streams, in order.

        Raises:
            ModelFailure: the thread has died.
        """
        if self._death is not None:
            raise self._death
        for message in messages:
            self._inbox.put(message)

    def num_pending_frames(self, source_ids: Collection[str]) -> int | None:
        """As of the stage: frames still to be stepped, None if one of the streams waits for its next piece.

        A message on its way to the stage counts as not yet there, so the caller may be a message late: harmless.
        """
        return self._stage.num_pending_frames(source_ids)

    @property
    def num_seated(self) -> int:
        """Streams that hold a slot."""
        return self._stage.num_open - self._stage.num_waiting

    @property
    def occupancy(self) -> float:
        """Share of slots that moved, over all passes so far."""
        stage = self._stage
        return stage.slot_passes / (stage.passes * stage.num_slots) if stage.passes else 0.0

    def stop(self) -> None:
        """End the thread after the pass it is in; streams that are not finished get no result."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._hand_out(self._stage.step())
        except Exception as error:  # noqa: BLE001  (whatever it was, whoever waits for a stream must hear of it)
            self._death = ModelFailure(f"the decoder failed: {type(error).__name__}: {error}")
            self._on_death(self._death)

    def _take_in(self) -> bool:
        """Move the inbox into the stage; wait only if no stream can move. False: stop."""
        try:
            message = self._inbox.get(block=not self._stage.can_step(), timeout=_IDLE_SECONDS)
            while True:
                if message is None:
                    return False
                if isinstance(message, _Open):
                    self._deliver[message.source_id] = message.deliver
                else:
                    self._hand_out(self._stage.accept(message))
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _hand_out(self, finished: Iterable[Tokens | Failure]) -> None:
        for result in self._align.run(finished):
            deliver = self._deliver.pop(result.source.id, None)
            if deliver is not None:
                deliver(result)
