"""Where the time of a pass goes, by kind of kernel; on a CPU by kind of operator.

Kinds are told by name, so a kernel of a library's next version may end up in the last of them.
"""

import re
import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from models.slots import Slots

# The first that matches; attention before products, since libraries say gemm in the names of both.
_KINDS = {
    "attention": r"_attend|fmha|flash|attention|softmax",
    "products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|::mm$|::bmm$|addmm|linear",
    "norms and gates": r"rms_norm|layer_norm|silu|rsqrt",
    "sampling": r"argmax|topk|sort|radix|scan|logsumexp|cumprod",
    "copies": r"memcpy|memset|copy_",
}
_REST = "elementwise and the rest"
_GAPS = "gaps"
_NUM_PASSES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Seconds of one pass on average."""

    pass_seconds: float
    kind_seconds: dict[str, float]  # longest first; `gaps`, when nothing runs, last

    def rows(self) -> list[tuple[str, ...]]:
        """Of a table, its head first. Shares are of the sum: profiled operators of a CPU take longer than a pass."""
        whole = sum(self.kind_seconds.values())
        shares = [
            (kind, f"{1e3 * seconds:.3f}", f"{seconds / whole:.0%}") for kind, seconds in self.kind_seconds.items()
        ]
        return [("kind", "ms/pass", "share"), *shares, ("a pass, not profiled", f"{1e3 * self.pass_seconds:.3f}", "")]

    def as_json(self) -> dict[str, float]:
        """Milliseconds by kind."""
        kinds = {kind: round(1e3 * seconds, 4) for kind, seconds in self.kind_seconds.items()}
        return {"pass_ms": round(1e3 * self.pass_seconds, 4), **kinds}


def dissect(slots: Slots, *, num_codebooks: int, codebook_size: int, device: torch.device) -> Anatomy:
    """Fill all slots with noise, go on until a third of it is behind, then time some passes and profile as many."""
    num_positions = slots.ring_frames - slots.lookahead
    rng = torch.Generator().manual_seed(0)
    for slot in range(slots.num_slots):
        slots.start(slot)
        slots.feed(slot, torch.randint(codebook_size, (num_codebooks, num_positions), generator=rng))
    third = num_positions // (3 * slots.lookahead)
    num_passes = max(1, min(_NUM_PASSES, third))
    slots.step(third)
    pass_seconds = _seconds(slots, num_passes, device) / num_passes  # without the profiler, which slows launches down
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        _seconds(slots, num_passes, device)
    kinds: dict[str, float] = {}
    for event in profiler.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == (device.type == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            kind = kind_of(event.key)
            kinds[kind] = kinds.get(kind, 0.0) + 1e-6 * microseconds / num_passes
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return Anatomy(
        pass_seconds=pass_seconds,
        kind_seconds=ordered | {_GAPS: max(0.0, pass_seconds - sum(kinds.values()))},
    )


def kind_of(name: str) -> str:
    """Which kind of work a kernel or an operator of this name does."""
    for kind, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return _REST


def _seconds(slots: Slots, num_passes: int, device: torch.device) -> float:
    _finish_work(device)
    begun = time.perf_counter()
    slots.step(num_passes)
    _finish_work(device)
    return time.perf_counter() - begun


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
