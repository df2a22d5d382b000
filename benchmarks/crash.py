"""Kill it, stop it, break its storage, at every step and at any moment; then count the rows.

What bounds this: two cores and Ray. A run is two to five starts of the command on a Ray that stays up, of processes
forked from one that has imported everything; inputs are 14 clips of a second, the model is tiny and real.

    python -m benchmarks.crash --runs 1000 --results crash.jsonl       seeds 0 to 999; those in the file are left out
    python -m benchmarks.crash --seed 123                              one of them again, whatever the file says

The last line is one JSON object. Exit code 1: some run broke a promise; its line says which, its folder is kept.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.failpoints import PLACES
from tests.crash.disturb import Expected, Outcome, disturb, prepare
from tests.crash.schedule import schedule_of
from tests.crash.world import World, world

_RUNS_PER_WORLD = 100  # then Ray begins anew: its logs grow with every driver


def main() -> int:
    """Run what is asked for; -> the exit code."""
    arguments = _arguments()
    results: Path | None = arguments.results
    seeds = [arguments.seed] if arguments.seed is not None else _open_seeds(arguments.first, arguments.runs, results)
    begun = time.monotonic()
    outcomes = _run(seeds, results, with_s3=not arguments.no_s3, folder=arguments.folder, pause=arguments.pause_while)
    summary = summarise(outcomes) | {"wall_seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(summary))
    return 1 if summary["failed"] else 0


def summarise(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tally of results, as they are in the file."""
    seconds = [outcome["seconds"] for outcome in outcomes]
    struck = Counter(name.split("@")[0] for outcome in outcomes for name in outcome["struck"])
    return {
        "runs": len(outcomes),
        "failed": [outcome["seed"] for outcome in outcomes if outcome["problems"]],
        "commands": sum(len(outcome["codes"]) for outcome in outcomes),
        "struck": dict(sorted(struck.items())),
        "stories": dict(Counter(outcome["schedule"]["story"] for outcome in outcomes)),
        "on_s3": sum(outcome["schedule"]["on_s3"] for outcome in outcomes),
        "readings": sum(outcome["num_looks"] for outcome in outcomes),
        "seconds_median": round(statistics.median(seconds), 2) if seconds else None,
        "seconds_max": max(seconds, default=None),
    }


def _run(
    seeds: Sequence[int], results: Path | None, *, with_s3: bool, folder: Path | None, pause: Path | None
) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("runs", total=len(seeds))
        for start in range(0, len(seeds), _RUNS_PER_WORLD):
            root = Path(tempfile.mkdtemp(prefix="kikitori-crash-", dir=folder))
            with world(root, with_s3=with_s3) as place:
                expected = prepare(place)
                for seed in seeds[start : start + _RUNS_PER_WORLD]:
                    while pause is not None and pause.exists():
                        time.sleep(1)
                    outcomes.append(_one(place, seed, expected, with_s3=with_s3))
                    _record(outcomes[-1], results)
                    failed = sum(bool(outcome["problems"]) for outcome in outcomes)
                    bar.update(task, advance=1, description=f"runs, {failed} failed")
            if not any(outcome["problems"] for outcome in outcomes[start:]):
                shutil.rmtree(root, ignore_errors=True)
    return outcomes


def _one(place: World, seed: int, expected: Expected, *, with_s3: bool) -> dict[str, Any]:
    schedule = schedule_of(seed, list(PLACES), with_s3=with_s3)
    try:
        outcome = disturb(place, schedule, expected)
    except Exception as error:  # noqa: BLE001  (whatever it was: the next run must go on, and this one count as failed)
        outcome = Outcome(name=schedule.name, problems=[f"{type(error).__name__}: {error}"])
    if outcome.problems:
        print(f"seed {seed}: {'; '.join(outcome.problems)}", file=sys.stderr)
    return {"seed": seed, **asdict(outcome), "schedule": schedule.as_json()}


def _record(outcome: dict[str, Any], results: Path | None) -> None:
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps(outcome) + "\n")


def _open_seeds(first: int, count: int, results: Path | None) -> list[int]:
    done: set[int] = set()
    if results is not None and results.exists():
        done = {json.loads(line)["seed"] for line in results.read_text().splitlines()}
    return [seed for seed in range(first, first + count) if seed not in done]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--results", type=Path, help="a line per run is added here; what is in it is not run again")
    parser.add_argument("--folder", type=Path, help="for outputs and logs; the system's temporary folder by default")
    parser.add_argument("--pause-while", type=Path, metavar="FILE", help="begin no run while this file exists")
    parser.add_argument("--no-s3", action="store_true", help="local outputs only; other schedules follow from a seed")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
