"""Damaged and hostile inputs through the real load stage: each must end in its samples or in a typed error, in time.

    python -m benchmarks.hostile --inputs 10000 --results hostile.jsonl
    python -m benchmarks.hostile --seed 123                              one of them; its bytes are kept

Inputs follow from their seeds (tests/hostile.py). They go through `LoadStage` in a process with the memory limit of a
loader. When the process dies or stands still, the input it was on is to blame, and the next process goes on behind it.

What bounds this: one core per process. The last line is one JSON object. Exit code 1: a process died or stood still,
something was raised that nobody foresaw, or an `ok` was too short or had no sample.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.loader import limit_memory
from pipeline.load import LoadStage, Padding
from pipeline.messages import Failure, Source
from pipeline.storage import Storage
from tests.hostile import Hostile, hostile

_PADDING = Padding(prefix_seconds=0.0, delay_seconds=0.5)
_LIMIT_SECONDS = 20.0  # for six seconds of audio, which take 10 ms
_MEMORY_GIB = 1.0
_BATCH = 200  # inputs of one process; its peak memory is that of the worst of them
_MISSING_SECONDS = 0.5  # as the load stage allows it
_START_SECONDS = 120.0
_READY = "ready"
_ACCIDENT = "please report it"  # in the message of a Failure that nobody foresaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one input ended."""

    seed: int
    name: str
    kind: str
    format: str
    code: str  # ok, an error code, `died` or `hung`
    message: str = ""
    true_seconds: float = 0.0
    seconds: float | None = None  # as the row would have it
    num_samples: int = 0
    wall_seconds: float = 0.0
    peak_mib: float = 0.0  # of the process, so far

    @property
    def problem(self) -> str | None:
        """What must not be; None if all is well."""
        if self.code in ("died", "hung"):
            return self.code
        if _ACCIDENT in self.message:
            return "accident"
        if self.code != "ok":
            return None
        if not self.num_samples or not self.seconds:
            return "ok without a sample"
        return "short" if self.true_seconds - self.seconds > _MISSING_SECONDS else None


def main() -> int:
    """Do what is asked for; -> the exit code."""
    arguments = _arguments()
    console = Console(stderr=True)
    if arguments.seed is not None:
        one = hostile(arguments.seed)
        path = Path(tempfile.gettempdir()) / f"hostile-{arguments.seed}"
        path.write_bytes(one.data)
        console.print(f"{one.name}: {path}")
        seeds: Sequence[int] = [arguments.seed]
    else:
        seeds = range(arguments.first, arguments.first + arguments.inputs)
    outcomes: list[Outcome] = []
    for outcome in track(run(seeds), total=len(seeds), console=console, description="inputs"):
        outcomes.append(outcome)
        if arguments.results is not None:
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.problem:
            console.print(f"{outcome.problem}: {outcome.name} {outcome.seconds} s {outcome.message[:200]}")
    console.print(table_of(outcomes))
    summary = summarise(outcomes)
    print(json.dumps(summary))
    return 1 if summary["problems"] else 0


def run(seeds: Sequence[int], make: Callable[[int], Hostile] = hostile) -> Iterator[Outcome]:
    """The outcome of every seed, in order; `make` makes the input of one."""
    done = 0
    while done < len(seeds):
        batch = seeds[done : done + _BATCH]
        for outcome in _run_batch(batch, make):
            done += 1
            yield outcome


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The tally."""
    problems = Counter(outcome.problem for outcome in outcomes if outcome.problem)
    return {
        "inputs": len(outcomes),
        "codes": dict(Counter(outcome.code for outcome in outcomes).most_common()),
        "problems": dict(problems),
        "seeds": {problem: [o.seed for o in outcomes if o.problem == problem][:20] for problem in problems},
        "wall_seconds_max": max((outcome.wall_seconds for outcome in outcomes), default=0.0),
        "peak_mib_max": max((outcome.peak_mib for outcome in outcomes), default=0.0),
    }


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Kinds of damage against how they ended."""
    codes = [code for code, _ in Counter(outcome.code for outcome in outcomes).most_common()]
    table = Table("made by", *codes, "problems")
    for kind in sorted({outcome.kind for outcome in outcomes}):
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = Counter(outcome.code for outcome in mine)
        problems = sum(outcome.problem is not None for outcome in mine)
        table.add_row(kind, *(str(counts[code] or "") for code in codes), str(problems or ""))
    return table


def _run_batch(seeds: Sequence[int], make: Callable[[int], Hostile]) -> Iterator[Outcome]:
    """Outcomes up to the end, or to the one that its process did not survive."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit whatever locks other threads hold
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(seeds, make, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_START_SECONDS) or receiver.recv() != _READY:
            raise RuntimeError("a process for the load stage does not start")
        for seed in seeds:
            code = "hung"
            if receiver.poll(_LIMIT_SECONDS):
                try:
                    yield receiver.recv()
                    continue
                except EOFError:
                    code = "died"
            one = make(seed)
            yield Outcome(
                seed=seed, name=one.name, kind=one.kind, format=one.format, code=code, true_seconds=one.true_seconds
            )
            return
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(seeds: Sequence[int], make: Callable[[int], Hostile], sender: Connection) -> None:
    sender.send(_READY)
    limit_memory(_MEMORY_GIB)
    stage = LoadStage(Storage(), _PADDING)
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            sender.send(_load(seed, make(seed), stage, Path(folder) / "input"))


def _load(seed: int, one: Hostile, stage: LoadStage, path: Path) -> Outcome:
    path.write_bytes(one.data)
    begun = time.monotonic()
    num_samples, failure, facts = 0, None, None
    for message in stage.run([Source(id=str(seed), uri=str(path))]):
        if isinstance(message, Failure):
            failure = message
        else:
            num_samples, facts = num_samples + len(message.samples), message.facts
    return Outcome(
        seed=seed,
        name=one.name,
        kind=one.kind,
        format=one.format,
        code=failure.code if failure else "ok",
        message=failure.message if failure else "",
        true_seconds=one.true_seconds,
        seconds=facts.duration_seconds if facts and not failure else None,
        num_samples=num_samples - _PADDING.tail_samples,
        wall_seconds=round(time.monotonic() - begun, 3),
        peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--results", type=Path, help="a line per input is added here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
