"""How fast the decoder's slots go on this machine, and how fast they could: the engine alone, no stage around it.

What bounds a pass is reading the weights once, and arithmetic where many positions share that reading
(`models/roofline.py`). Runs with torch and numpy alone, so that a machine with a GPU and little else can measure.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from models.config import DecoderConfig
from models.decoder import Decoder
from models.roofline import Machine, PassCost, pass_cost
from models.slots import Harvest, Report, Slots
from pipeline.workload import Clips

_BUNDLE_PASSES = 32
_PROBE_SECONDS = 0.3
_PROBE_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # far beyond any cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Ride:
    """One workload's passage through the slots."""

    wall_seconds: float
    passes: int
    slot_passes: int  # slots that moved, over all passes
    positions: int  # tokens emitted
    mean_context: float  # positions of the past that a moving slot attended to


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of the engine, ridden several times."""

    num_slots: int
    lookahead: int
    rides: tuple[Ride, ...]
    credited_seconds: float
    step_seconds: float
    cost: PassCost
    machine: Machine

    @property
    def wall_seconds(self) -> float:
        """Of the median ride."""
        return median(ride.wall_seconds for ride in self.rides)

    @property
    def spread(self) -> float:
        """Slowest minus fastest ride, as a share of the median."""
        walls = [ride.wall_seconds for ride in self.rides]
        return (max(walls) - min(walls)) / self.wall_seconds

    @property
    def rtfx(self) -> float:
        """Seconds of speech per wall second."""
        return self.credited_seconds / self.wall_seconds

    @property
    def step_rtfx(self) -> float:
        """Seconds of frames, padding included, per wall second."""
        return self.step_seconds / self.wall_seconds

    @property
    def pass_seconds(self) -> float:
        """Wall time of one pass, what lies between passes included."""
        return self.wall_seconds / self.rides[0].passes

    @property
    def limit_seconds(self) -> float:
        """What the machine allows for that pass."""
        return self.cost.limit_seconds(self.machine)

    @property
    def gained(self) -> float:
        """Tokens of a stream per pass: 1 without look-ahead."""
        return self.rides[0].positions / self.rides[0].slot_passes

    @property
    def occupancy(self) -> float:
        """Share of the slots that moved, on average over the passes."""
        return self.rides[0].slot_passes / (self.rides[0].passes * self.num_slots)

    def as_json(self) -> dict[str, float | int | str | list[float]]:
        """The row of a table, seconds as seconds."""
        return {
            "slots": self.num_slots,
            "lookahead": self.lookahead,
            "rtfx": round(self.rtfx, 2),
            "step_rtfx": round(self.step_rtfx, 2),
            "wall_seconds": [round(ride.wall_seconds, 4) for ride in self.rides],
            "spread": round(self.spread, 4),
            "passes": self.rides[0].passes,
            "tokens_per_pass": round(self.gained, 3),
            "occupancy": round(self.occupancy, 4),
            "mean_context": round(self.rides[0].mean_context, 1),
            "pass_ms": round(1e3 * self.pass_seconds, 4),
            "limit_ms": round(1e3 * self.limit_seconds, 4),
            "of_limit": round(self.limit_seconds / self.pass_seconds, 4),
            "bound": self.cost.bound(self.machine),
            "pass_megabytes": round(self.cost.num_bytes / 1e6, 2),
            "pass_gigaflops": round(self.cost.flops / 1e9, 3),
        }


@dataclass(slots=True, eq=False)
class _Seat:
    """A clip in a slot."""

    clip: int
    codes_KT: torch.Tensor  # the BOS column first
    num_fed: int = 0
    num_emitted: int = 0
    ids: list[NDArray[np.int32]] = field(default_factory=list)

    @property
    def num_unfed(self) -> int:
        """Columns that the slot has not been given."""
        return self.codes_KT.shape[1] - self.num_fed


class _Rider:
    """Clips, longest first, on their way through the slots; passes in bundles, as `pipeline/generate.py` does it."""

    def __init__(self, slots: Slots, columns: Sequence[torch.Tensor], *, context: int) -> None:
        self._slots, self._columns, self._context = slots, columns, context
        self._waiting = deque(sorted(range(len(columns)), key=lambda clip: -columns[clip].shape[1]))
        self._seats: list[_Seat | None] = [None] * slots.num_slots
        self._started: deque[tuple[Report, list[_Seat | None]]] = deque()
        self.tokens: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(columns)
        self.passes = self.slot_passes = self.positions = self.attended = 0

    def ride(self, *, num_unread: int) -> None:
        """Until nothing is left; `num_unread` bundles are left running while the host goes on."""
        while True:
            self._seat()
            active = [slot for slot in range(self._slots.num_slots) if self._slots.may_move(slot)]
            if active:
                self._start(active)
            elif not self._started:
                return
            while len(self._started) > (num_unread if active else 0):
                self._read(*self._started.popleft())

    def _seat(self) -> None:
        for slot, seat in enumerate(self._seats):
            if seat is None or (not seat.num_unfed and not self._slots.may_move(slot)):
                seat = self._seats[slot] = self._next(slot)
            if seat is not None:
                self._feed(slot, seat)

    def _next(self, slot: int) -> _Seat | None:
        if not self._waiting:
            return None
        self._slots.start(slot)
        clip = self._waiting.popleft()
        return _Seat(clip, self._columns[clip])

    def _feed(self, slot: int, seat: _Seat) -> None:
        """Write audio ahead when little is left there, as much as there is room for."""
        count = min(self._slots.room(slot), seat.num_unfed)
        if count > 0 and self._slots.num_ahead(slot) < self._slots.ring_frames // 2:
            self._slots.feed(slot, seat.codes_KT[:, seat.num_fed : seat.num_fed + count])
            seat.num_fed += count

    def _start(self, active: Sequence[int]) -> None:
        num_passes = self._slots.num_passes_until_news(active, at_most=_BUNDLE_PASSES)
        self._slots.step(num_passes)
        self.passes += num_passes
        self._started.append((self._slots.report(), list(self._seats)))

    def _read(self, report: Report, seats: Sequence[_Seat | None]) -> None:
        for seat, harvest in zip(seats, self._slots.read(report), strict=True):
            if seat is not None and len(harvest.ids):
                self._take(seat, harvest)

    def _take(self, seat: _Seat, harvest: Harvest) -> None:
        num = len(harvest.ids)
        self.positions += num
        self.slot_passes += harvest.num_moves
        self.attended += harvest.num_moves * min(self._context, seat.num_emitted + num // 2)
        seat.num_emitted += num
        seat.ids.append(harvest.ids)
        if seat.num_emitted == seat.codes_KT.shape[1]:
            self.tokens[seat.clip] = np.concatenate(seat.ids)


def ride(
    slots: Slots, codes: Sequence[NDArray[np.int16]], *, device: torch.device, context: int
) -> tuple[Ride, list[NDArray[np.int32]]]:
    """Put the clips through the slots, longest first; -> what it took, and every clip's tokens."""
    columns = [torch.from_numpy(np.pad(clip, ((0, 0), (1, 0)))).to(device) for clip in codes]
    rider = _Rider(slots, columns, context=context)
    _finish_work(device)
    begun = time.perf_counter()
    # A CPU does nothing while its host does something else, and would only learn later that a stream is over.
    rider.ride(num_unread=1 if device.type == "cuda" else 0)
    _finish_work(device)
    result = Ride(
        wall_seconds=time.perf_counter() - begun,
        passes=rider.passes,
        slot_passes=rider.slot_passes,
        positions=rider.positions,
        mean_context=rider.attended / rider.slot_passes,
    )
    return result, rider.tokens


def sweep(
    decoder: Decoder,
    clips: Clips,
    *,
    num_slots: Sequence[int],
    lookaheads: Sequence[int],
    repeats: int,
    padding_id: int,
    machine: Machine,
    use_graphs: bool | None = None,
    on_ride: Callable[[int, int], None] = lambda _slots, _lookahead: None,
) -> list[Point]:
    """Every number of slots with every look-ahead; repeats go round all settings, so that a slow minute hits all."""
    settings = [(slots, lookahead) for slots in num_slots for lookahead in lookaheads]
    rides: dict[tuple[int, int], list[Ride]] = {setting: [] for setting in settings}
    for _ in range(repeats):
        for setting in settings:
            on_ride(*setting)
            rides[setting].append(one_ride(decoder, clips, *setting, padding_id=padding_id, use_graphs=use_graphs))
    return [_point(decoder, clips, slots, lookahead, rides[slots, lookahead], machine) for slots, lookahead in settings]


def one_ride(
    decoder: Decoder,
    clips: Clips,
    num_slots: int,
    lookahead: int,
    *,
    padding_id: int,
    use_graphs: bool | None = None,
) -> Ride:
    """New slots, warmed up, and one ride; `use_graphs` as of `Slots`."""
    slots = Slots(decoder, num_slots, lookahead=lookahead, padding_id=padding_id, use_graphs=use_graphs)
    context = decoder.config.context
    warm_up = [clip[:, :8] for clip in clips.codes[:num_slots]]
    ride(slots, warm_up, device=decoder.device, context=context)
    return ride(slots, clips.codes, device=decoder.device, context=context)[0]


def _point(
    decoder: Decoder, clips: Clips, num_slots: int, lookahead: int, rides: Sequence[Ride], machine: Machine
) -> Point:
    occupied = rides[0].slot_passes / rides[0].passes
    cost = pass_cost(
        decoder.config,
        num_slots=1,
        num_positions=lookahead,
        filled_context=rides[0].mean_context,
        itemsize=decoder.dtype.itemsize,
    )
    return Point(
        num_slots=num_slots,
        lookahead=lookahead,
        rides=tuple(rides),
        credited_seconds=clips.credited_seconds,
        step_seconds=clips.step_seconds,
        # Empty slots need not be computed, so the limit is that of the slots that moved.
        cost=PassCost(
            weight_bytes=cost.weight_bytes, cache_bytes=cost.cache_bytes * occupied, flops=cost.flops * occupied
        ),
        machine=machine,
    )


def probe(config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the memory bus with large tensors, and arithmetic with the decoder's largest product."""
    numel = _PROBE_BYTES[device.type] // dtype.itemsize
    numel = min(numel, 64 * 2**20 * max(1, config.dim // 64))  # a tiny model is measured in a moment
    source, target = (torch.zeros(numel, device=device, dtype=dtype) for _ in range(2))
    moved = numel * dtype.itemsize
    bandwidth = max(
        2 * moved / _best_seconds(lambda: target.copy_(source), device),
        # A CPU that writes also reads what it overwrites; a pass mostly reads.
        moved / _best_seconds(source.sum, device),
    )
    rows = torch.randn(4096 if device.type == "cuda" else 512, config.dim, device=device).to(dtype)
    weight = torch.randn(2 * config.mlp_dim, config.dim, device=device).to(dtype)
    flops = 2 * rows.numel() * weight.shape[0]
    return Machine(
        bytes_per_second=bandwidth,
        flops_per_second=flops / _best_seconds(lambda: torch.nn.functional.linear(rows, weight), device),
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of what fits into a moment; at least three."""
    work()
    return min(_timings(work, device))


def _timings(work: Callable[[], object], device: torch.device) -> Iterator[float]:
    begun, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begun < _PROBE_SECONDS:
        _finish_work(device)
        before = time.perf_counter()
        work()
        _finish_work(device)
        yield time.perf_counter() - before
        count += 1


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
