"""Where a batch of disturbed runs happens: one Ray for all of them, one S3 behind a proxy, inputs, what to expect."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from pipeline import failpoints
from tests.crash.forks import Forked, fork_command, write_client
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.make_audio import encoded, wav
from tests.processes import actors
from tests.s3 import KEY, SECRET, S3Server, serve
from tests.tiny import clip, write_original

_CODE = Path(__file__).parent.parent.parent
_NODE_CPUS = 8  # lanes of two drivers, and of those that are dying
NUM_INPUTS, NUM_BROKEN = 14, 2
ACTORS = ("LoadActor", "EncoderActor", "DecoderActor")
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a Ray that this process had before would have put another mode into its environment
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(_CODE),
    "PYTHONUNBUFFERED": "1",
}


@dataclass(slots=True)
class Place:
    """The output of one disturbed run, and what belongs to it."""

    folder: Path
    output_uri: str
    storage_options: dict[str, Any]  # as the system under test has them: through the proxy
    direct_options: dict[str, Any]  # past the proxy
    scratch: Path = field(init=False)

    def __post_init__(self) -> None:
        self.scratch = self.folder / "failpoints"
        self.scratch.mkdir(parents=True)


class World:
    """One Ray, joined by every driver; started workers and drivers are forked."""

    def __init__(self, folder: Path, running: ExitStack, *, with_s3: bool) -> None:
        self.folder = folder
        self._running = running
        self._socket = folder / "forks"
        self.forks_pid = self._begin_forks()
        write_client(folder / "python", self._socket)
        self.inputs = write_inputs(folder / "in")
        self.checkpoint = write_original(folder / "checkpoint")
        self._cluster, self._node = self._begin_ray()
        self.s3: S3Server | None = None
        self.proxy: FaultProxy | None = None
        self.bucket = ""
        if with_s3:
            self.s3 = running.enter_context(serve(folder / "s3"))
            self.proxy = running.enter_context(fault_proxy(self.s3.port, key=KEY, secret=SECRET))
            self.bucket = self.s3.new_bucket()

    def place(self, name: str, *, on_s3: bool) -> Place:
        """A new output."""
        folder = self.folder / "runs" / name
        folder.mkdir(parents=True)
        if not on_s3:
            return Place(folder, str(folder / "out"), {}, {})
        assert self.s3 is not None
        assert self.proxy is not None
        quick = {"read_timeout": 3, "connect_timeout": 2}
        through = self.s3.options(endpoint=self.proxy.endpoint, **quick)
        return Place(folder, f"s3://{self.bucket}/{name}", through, self.s3.options())

    def begin(
        self,
        place: Place,
        *options: str,
        verb: str = "run",
        failpoints_text: str = "",
        overrides: Mapping[str, Any] | None = None,
    ) -> Forked:
        """Begin a command, armed or not."""
        config = {
            "checkpoint": {"source": str(self.checkpoint), "device": "cpu"},
            "input": {"uris": [str(self.inputs)], "shard_audio_hours": 0.0005},
            "output": {"uri": place.output_uri, "columns": ["tokens"], "storage_options": place.storage_options},
            "stages": {"generate": {"slots": 4}},
            "ray": {"address": self._cluster.address, "lanes": 1},
        }
        for key, value in (overrides or {}).items():
            *path, last = key.split(".")
            section: Any = config
            for name in path:
                section = section.setdefault(name, {})
            section[last] = value
        path = place.folder / f"job-{len(list(place.folder.glob('job-*')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        armed = {failpoints.VARIABLE: failpoints_text, failpoints.FOLDER_VARIABLE: str(place.scratch)}
        job = {"runtime_env": {"env_vars": {**armed, "OMP_NUM_THREADS": "1"}}}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "KIKITORI_"))}
        environment = {**kept, **_ENVIRONMENT, **armed, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
        arguments = [verb, str(path), "--json", *options]
        process = fork_command(
            self._socket, arguments, environment=environment, folder=place.folder, log_path=place.folder / "log"
        )
        self._running.callback(process.close)
        return process

    def kill_node(self) -> None:
        """SIGKILL the raylet all lanes are on, and let another machine join."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        for pid in (pid for name in ACTORS for pid in actors(name, root=self.forks_pid)):
            with suppress(ProcessLookupError):  # they are not below the raylet, and end only when they miss it
                os.kill(pid, signal.SIGKILL)
        self.add_node()

    def add_node(self) -> None:
        with _python(self.folder / "python"):
            self._node = self._cluster.add_node(num_cpus=_NODE_CPUS, object_store_memory=200 * 2**20)

    def _begin_forks(self) -> int:
        environment = {**os.environ, **_ENVIRONMENT}
        command = [sys.executable, "-m", "tests.crash.forks", str(self._socket)]
        parent = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=_CODE, env=environment)
        self._running.callback(_end, parent)
        while not self._socket.exists():
            if parent.poll() is not None:
                raise RuntimeError("the parent of all processes did not start")
            time.sleep(0.05)
        return parent.pid

    def _begin_ray(self) -> tuple[Any, Any]:
        ours = {key: value for key, value in _ENVIRONMENT.items() if key.startswith("RAY_")}
        self._running.enter_context(patch.dict(os.environ, ours))
        from ray.cluster_utils import Cluster

        with _python(self.folder / "python"):
            cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20},
            )
            self._running.callback(cluster.shutdown)
            node = cluster.add_node(num_cpus=_NODE_CPUS, object_store_memory=200 * 2**20)
        return cluster, node


@contextmanager
def world(folder: Path, *, with_s3: bool = False) -> Generator[World]:
    """One that ends with the block, with everything that was started in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        yield World(folder, running, with_s3=with_s3)


def write_inputs(folder: Path) -> Path:
    """Clips of 0.3 to 1 s in two containers, and two files that are no audio."""
    folder.mkdir()
    for index in range(NUM_INPUTS - NUM_BROKEN):
        samples = clip(index, 7_200 + 1_400 * index)
        if index % 3:
            (folder / f"{index:02d}.wav").write_bytes(wav(samples))
        else:
            (folder / f"{index:02d}.flac").write_bytes(encoded(samples, container="flac", codec="flac"))
    for index in range(NUM_BROKEN):
        (folder / f"broken{index}.wav").write_bytes(b"this is not audio" * (index + 1))
    return folder


def wait_for(process: Forked, *, seconds: float) -> int:
    """-> its exit code; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while (code := process.poll()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process.pid} is still there after {seconds:g} s")
        time.sleep(0.02)
    return code


@contextmanager
def _python(client: Path) -> Generator[None]:
    """Ray takes `sys.executable` for its workers."""
    before, sys.executable = sys.executable, str(client)
    try:
        yield
    finally:
        sys.executable = before


def _end(parent: "subprocess.Popen[bytes]") -> None:
    assert parent.stdin is not None
    parent.stdin.close()
    parent.wait(timeout=20)
