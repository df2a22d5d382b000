"""One job on an S3 server, killed -9 at random moments and run again to its end; then its rows, byte for byte.

The real command, the demo checkpoint, a Ray of each command's own, SeaweedFS on loopback, inputs and output on it.
Every form of input is run once in peace and once with kills, workers and the driver in turn, while a reader opens the
output by its folder with pyarrow and with pandas.

    python -m benchmarks.kills                                     500 clips, 10 kills, as files and as Parquet
    python -m benchmarks.kills --clips 60 --kills 3 --form folder

What bounds this: Ray's start, again after every kill of a driver, and two cores. The last line is one JSON object. Exit
code 1: a row was lost, doubled or different, or a reader saw what it must not see.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pandas as pd
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from tests.containers import audio_table
from tests.make_audio import encoded, wav
from tests.processes import actors
from tests.s3 import S3Server, serve
from tests.speech import clips

Form = Literal["folder", "parquet"]
Rows = list[dict[str, Any]]

_WORKERS = ("DecoderActor", "EncoderActor", "LoadActor")
_BROKEN_EVERY = 50  # clips; these are no audio
_ROWS_PER_FILE, _ROWS_PER_GROUP = 100, 20  # of the Parquet form
_POLL_SECONDS = 0.02
_COMPARED = ("id", "text", "words")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One SIGKILL."""

    victim: str
    after_seconds: float  # since the command began
    num_parts: int  # that were committed

    def __str__(self) -> str:
        return f"{self.victim} at {self.after_seconds:.1f} s, {self.num_parts} parts"


@dataclass(slots=True)
class Reader:
    """Somebody who opens the output by its folder all the time, as long as a block lasts."""

    folder: str
    filesystem: Any
    num_looks: int = 0
    problems: list[str] = field(default_factory=list[str])
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Reader":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> list[str]:
        """The ids that are there, by one reader and then by the other."""
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.folder):
            return []
        self.num_looks += 1
        if self.num_looks % 2:
            return pq.read_table(self.folder, filesystem=self.filesystem, columns=["id"])["id"].to_pylist()
        return list(pd.read_parquet(self.folder, filesystem=self.filesystem, columns=["id"])["id"])

    def _watch(self) -> None:
        before: set[str] = set()
        while not self._stop.wait(0.5):
            try:
                ids = self.look()
            except Exception as error:  # noqa: BLE001  (whatever a reader raises is the finding)
                self.problems.append(f"a reader could not read: {type(error).__name__}: {error}")
                continue
            if len(set(ids)) < len(ids):
                self.problems.append("a reader saw an input twice")
            if before - set(ids):
                self.problems.append("rows that a reader had seen went away")
            before = set(ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where a job reads and writes, and the command for it."""

    folder: Path  # on this machine, for its config
    server: S3Server
    inputs: str  # s3://BUCKET/...
    output: str

    def begin(self) -> "subprocess.Popen[bytes]":
        """The command, with a Ray of its own."""
        config = {
            "checkpoint": {"source": "demo", "device": "cpu"},
            "input": {
                "uris": [self.inputs],
                "shard_audio_hours": 0.01,
                "storage_options": self.server.options(),
            },
            "output": {"uri": self.output, "storage_options": self.server.options()},
            "stages": {"load": {"cpus": 0.5, "actors": 2}, "generate": {"slots": 8}},
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        command = [str(Path(sys.executable).with_name("kikitori")), "run", str(path), "--json"]
        with (self.folder / "log").open("ab") as log:
            code = Path(__file__).parent.parent
            return subprocess.Popen(command, env=environment, cwd=code, stdout=log, stderr=log, start_new_session=True)

    def filesystem(self) -> Any:
        """Past every cache."""
        return fsspec.filesystem("s3", **self.server.options(), use_listings_cache=False, skip_instance_cache=True)

    @property
    def data(self) -> str:
        """The folder of the parts, as pyarrow names it."""
        return self.output.removeprefix("s3://") + "/data"

    def num_parts(self) -> int:
        """Committed so far."""
        filesystem = self.filesystem()
        return len(filesystem.glob(f"{self.data}/part-*.parquet")) if filesystem.exists(self.data) else 0

    def rows(self) -> Rows:
        """All of them, by id."""
        table: Any = pq.read_table(self.data, filesystem=self.filesystem())
        return sorted(table.to_pylist(), key=lambda row: row["id"])


def main() -> int:
    """Do what is asked for; -> the exit code."""
    arguments = _arguments()
    console = Console(stderr=True)
    forms: list[Form] = ["folder", "parquet"] if arguments.form == "both" else [arguments.form]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kikitori-kills-") as folder, serve(Path(folder) / "s3") as server:
        for form in forms:
            rng = random.Random(f"{arguments.seed} {form}")
            inputs = write_inputs(server, form, arguments.clips, seed=arguments.seed)
            results.append({"form": form} | _compare(Path(folder), server, inputs, arguments.kills, rng, console))
    summary = {"clips": arguments.clips, "seed": arguments.seed, "forms": results}
    print(json.dumps(summary))
    return 1 if any(result["problems"] for result in results) else 0


def write_inputs(server: S3Server, form: Form, count: int, *, seed: int) -> str:
    """Put the clips into a bucket of their own; -> its URI."""
    bucket = server.new_bucket()
    filesystem: Any = fsspec.filesystem("s3", **server.options())
    files = [(f"{index:04d}.{suffix}", data) for index, (suffix, data) in enumerate(_audio(count, seed=seed))]
    if form == "folder":
        for name, data in files:
            filesystem.pipe_file(f"{bucket}/in/{name[:2]}/{name}", data)
        return f"s3://{bucket}/in"
    for start in range(0, count, _ROWS_PER_FILE):
        table = audio_table([(data, name) for name, data in files[start : start + _ROWS_PER_FILE]])
        with filesystem.open(f"{bucket}/in/train-{start // _ROWS_PER_FILE:05d}.parquet", "wb") as sink:
            pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP)
    return f"s3://{bucket}/in"


def problems_of(expected: Rows, found: Rows) -> list[str]:
    """What is lost, doubled, or not byte for byte what it must be."""
    times = Counter(row["id"] for row in found)
    wanted = {row["id"]: row for row in expected}
    problems = [f"{id}: {count} rows" for id, count in times.items() if count > 1]
    problems += [f"{id}: no row" for id in wanted.keys() - times.keys()]
    problems += [f"{id}: is no input" for id in times.keys() - wanted.keys()]
    return problems + [
        f"{row['id']}: {column} is {row[column]!r:.60}, not {wanted[row['id']][column]!r:.60}"
        for row in found
        if row["id"] in wanted
        for column in (*_COMPARED, "status", "error_code")
        if json.dumps(row[column]) != json.dumps(wanted[row["id"]][column])
    ]


def _audio(count: int, *, seed: int) -> list[tuple[str, bytes]]:
    """Suffix and bytes of each input: WAV, FLAC, MP3 in turn, and some that are no audio."""
    found: list[tuple[str, bytes]] = []
    for index, samples in enumerate(clips(count, seed=seed)):
        if index % _BROKEN_EVERY == _BROKEN_EVERY - 1:
            found.append(("wav", b"no audio %d" % index))
        elif index % 3 == 0:
            found.append(("wav", wav(samples)))
        elif index % 3 == 1:
            found.append(("flac", encoded(samples, container="flac", codec="flac")))
        else:
            found.append(("mp3", encoded(samples, container="mp3", codec="libmp3lame", layout="stereo")))
    return found


def _compare(
    folder: Path, server: S3Server, inputs: str, num_kills: int, rng: random.Random, console: Console
) -> dict[str, Any]:
    """Run once in peace, once with kills; -> what came of it."""
    bucket = inputs.removesuffix("/in")
    peaceful = _new_job(folder, server, inputs, f"{bucket}/peace")
    begun = time.monotonic()
    code = peaceful.begin().wait()
    peace_seconds = time.monotonic() - begun
    if code not in (0, 1):
        raise SystemExit(f"the undisturbed run ended with {code}:\n{(peaceful.folder / 'log').read_text()[-2000:]}")
    expected = peaceful.rows()
    console.print(f"{inputs}: {len(expected)} rows in {peace_seconds:.0f} s, undisturbed")
    job = _new_job(folder, server, inputs, f"{bucket}/kills")
    begun = time.monotonic()
    with Reader(job.data, job.filesystem()) as reader:
        kills, codes = disturb(
            job, num_kills, rng, peaceful.num_parts(), lambda kill: console.print(f"  killed {kill}")
        )
    found = job.rows()
    problems = problems_of(expected, found) + reader.problems
    if len(kills) < num_kills:
        problems.append(f"only {len(kills)} of {num_kills} kills before the end")
    if codes[-1] not in (0, 1):
        problems.append(f"the last command ended with {codes[-1]}")
    console.print(f"  {len(found)} rows after {len(kills)} kills, {len(codes)} commands; {len(problems)} problems")
    for problem in problems[:20]:
        console.print(f"  {problem}")
    return {
        "rows": len(found),
        "rows_ok": sum(row["status"] == "ok" for row in found),
        "digest": _digest(found),
        "undisturbed_digest": _digest(expected),
        "parts": job.num_parts(),
        "kills": [str(kill) for kill in kills],
        "codes": codes,
        "readings": reader.num_looks,
        "problems": problems,
        "undisturbed_seconds": round(peace_seconds, 1),
        "seconds": round(time.monotonic() - begun, 1),
    }


def disturb(
    job: Job, num_kills: int, rng: random.Random, num_parts: int, tell: Callable[[Kill], None]
) -> tuple[list[Kill], list[int]]:
    """Kill workers and the driver in turn at random moments, run again until the end; -> the kills, all exit codes.

    A moment is so many parts committed, none at the least, and then up to a second. That spreads the kills over the
    whole job, however often it begins anew.
    """
    moments = sorted(rng.randrange(max(1, num_parts - 1)) for _ in range(num_kills))
    kills: list[Kill] = []
    codes: list[int] = []
    process, begun = job.begin(), time.monotonic()
    for number, moment in enumerate(moments):
        victim = "driver" if number % 2 else _WORKERS[number // 2 % len(_WORKERS)]
        later = rng.uniform(0.0, 1.0)
        while process.poll() is None and job.num_parts() < moment:
            time.sleep(_POLL_SECONDS)
        pid = _victim(process, victim, time.monotonic() + later)
        if pid is None:  # it has come to its end
            break
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        kills.append(Kill(victim=victim, after_seconds=time.monotonic() - begun, num_parts=job.num_parts()))
        tell(kills[-1])
        if victim == "driver":
            codes.append(process.wait())
            process, begun = job.begin(), time.monotonic()
    codes.append(process.wait())
    return kills, codes


def _victim(process: "subprocess.Popen[bytes]", victim: str, moment: float) -> int | None:
    """-> its pid, from the moment on and as soon as it is there; None if the command ends first."""
    while process.poll() is None:
        pids = [process.pid] if victim == "driver" else actors(victim, root=process.pid)
        if pids and time.monotonic() >= moment:
            return pids[-1]
        time.sleep(_POLL_SECONDS)
    return None


def _new_job(folder: Path, server: S3Server, inputs: str, output: str) -> Job:
    own = folder / hashlib.sha256(output.encode()).hexdigest()[:8]
    own.mkdir()
    return Job(folder=own, server=server, inputs=inputs, output=output)


def _digest(rows: Rows) -> str:
    """Of what is compared; two outputs with the same one hold the same transcripts."""
    kept = [{column: row[column] for column in _COMPARED} for row in rows]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode()).hexdigest()[:16]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10, help="per form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=["folder", "parquet", "both"], default="both")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
