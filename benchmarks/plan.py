"""Time and memory of planning: ten million lines of a manifest should cost minutes, and of memory little more than
their ids, 16 bytes each.

    python -m benchmarks.plan --inputs 100000 --inputs 1000000 --inputs 10000000

What bounds it: one Python thread, which makes a source and its id of every line. Nothing that the manifest names is
looked at, so no audio is needed. Every number of inputs is planned, planned again (all known) and read back (as
`status` does it, and the sources of 100 shards, as a driver does it), each in a process of its own.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import InputConfig, OutputConfig, RunConfig
from pipeline.manifests import load_shard
from pipeline.plan import Plan, make_plan, read_plan
from pipeline.storage import Storage

_LINES_AT_A_TIME = 100_000
_NUM_SHARDS_READ = 100
_STEPS = ("import", "plan", "plan again", "read back")


def main() -> None:
    """Plan each number of inputs in fresh processes and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, action="append", help="how many; repeatable")
    parser.add_argument("--one", choices=_STEPS, help="do this in this process and print one JSON object")
    parser.add_argument("--folder", type=Path, help="of --one")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments.one, arguments.folder)))
        return
    counts: list[int] = arguments.inputs or [100_000, 1_000_000, 10_000_000]
    rows = [row for count in counts for row in _plan(count)]
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "pyarrow": pa.__version__}
    print(json.dumps({"benchmark": "plan", **machine, "rows": rows}))


def _plan(num_inputs: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        write_manifest(Path(name) / "in.jsonl", num_inputs)
        for step in _STEPS:
            command = [sys.executable, "-m", "benchmarks.plan", "--one", step, "--folder", name]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append({"inputs": num_inputs, "step": step, **found})
            spent = f"{found['seconds']:8.2f} s, of CPU {found['cpu_seconds']:8.2f} s"
            print(f"{num_inputs:>11,} {step:<10} {spent}, peak {found['peak_mib']:7.1f} MiB", flush=True)
    return rows


def write_manifest(path: Path, num_inputs: int) -> None:
    """Segments of hour-long recordings, as corpora of this size are: 300 of each, one after the other, of 1 to 20 s."""
    rng = random.Random(0)
    with path.open("w") as file:
        for first in range(0, num_inputs, _LINES_AT_A_TIME):
            numbers = range(first, min(num_inputs, first + _LINES_AT_A_TIME))
            file.writelines(_line(number, rng.randrange(100, 2000) / 100) for number in numbers)


def _line(number: int, duration: float) -> str:
    recording, segment = divmod(number, 300)
    name = f"recordings/{recording // 1000:04d}/{recording:08d}.flac"
    text = "what was said there, as the corpus has it"
    return f'{{"audio_filepath": "{name}", "offset": {segment * 12}.25, "duration": {duration}, "text": "{text}"}}\n'


def _measure(step: str, folder: Path) -> dict[str, Any]:
    config = RunConfig(input=InputConfig(uris=[f"{folder}/in.jsonl"]), output=OutputConfig(uri=f"{folder}/out"))
    steps: dict[str, Callable[[], Plan]] = {
        "import": lambda: Plan(shards=()),
        "plan": lambda: make_plan(config, Storage(), Storage()),
        "plan again": lambda: make_plan(config, Storage(), Storage()),
        "read back": lambda: _read_back(f"{folder}/out"),
    }
    begun, cpu_begun = time.perf_counter(), time.process_time()
    plan = steps[step]()
    return {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(time.process_time() - cpu_begun, 2),  # on a machine that others share, the better figure
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "planned": plan.num_inputs,
        "shards": len(plan.shards),
        "manifest_mib": round(sum(path.stat().st_size for path in folder.glob("out/_kikitori/manifest/*")) / 2**20, 1),
    }


def _read_back(output_uri: str) -> Plan:
    plan, storage = read_plan(output_uri, Storage()), Storage()
    for ref in random.Random(0).sample(plan.shards, min(_NUM_SHARDS_READ, len(plan.shards))):
        assert len(load_shard(ref, storage).sources) == ref.num_inputs
    return plan


if __name__ == "__main__":
    main()
