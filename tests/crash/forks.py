"""Processes that begin with everything imported: a parent that has imported it forks them.

A driver or a Ray worker spends 3 s of a core on `import torch, ray, pyarrow, ...`; a run with kills begins a dozen of
them. Forked, each is there within 0.1 s, and is a process like any other: it can be killed, stopped, and found by pid.
Ray gets in the place of Python a small program, `client_script`, that asks the parent for a worker.

    python -m tests.crash.forks SOCKET          the parent; serves until its standard input ends
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Not ray.dag: it draws a random number, and then all forks would go on to draw the same "random" ids.
_PRELOADED = (
    "ray",
    "ray._private.workers",
    "ray.util.placement_group",
    "ray.util.scheduling_strategies",
    "ray._private.async_compat",
    "ray._private.external_storage",
    "ray._private.workers.setup_worker",
    "ray._private.arrow_serialization",
    "ray._private.runtime_env.uv_runtime_env_hook",
    "ray._common.usage.usage_lib",
    "ray._common.pydantic_compat",
    "starlette.exceptions",
    "starlette.concurrency",
    "pydantic.v1",
    "av.subtitles.stream",
    "uvloop",
    "torch",
    "numpy",
    "pyarrow",
    "pyarrow.parquet",
    "pyarrow.compute",
    "av",
    "soxr",
    "sentencepiece",
    "tokenizers",
    "safetensors.torch",
    "s3fs",
    "aiobotocore.session",
    "botocore.exceptions",
    "botocore.parsers",
    "aiohttp",
    "rich.progress",
    "deploy.cli",
    "actors.job",
    "actors.decoder",
    "actors.encoder",
    "actors.loader",
    "pipeline.run",
    "pipeline.failpoints",
)
_MAX_REQUEST_BYTES = 1 << 20
_MAX_REGION_BYTES = 256 << 20
# As long as they can be; a number may begin with zeros.
_NOWHERE = {"RAY_JOB_ID": "0badbeef", "RAY_RAYLET_PID": "9999999999"}
# Everything but a Ray worker (its agents, say) goes to the real Python.
_CLIENT = """#!{python} -SEI
import json, os, socket, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith("setup_worker.py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as parent:
    parent.connect({socket!r})
    request = {{"argv": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
    socket.send_fds(parent, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
    answers = parent.makefile().read().split()
os._exit(int(answers[-1]) if len(answers) == 2 and int(answers[-1]) >= 0 else 1)
"""


@dataclass(slots=True)
class Forked:
    """A process begun by `fork_command`; its parent is another, so it is waited for through a socket."""

    pid: int
    connection: socket.socket = field(repr=False)
    _code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            with contextlib.suppress(BlockingIOError):
                self.connection.setblocking(False)
                self._code = int(self.connection.recv(64) or b"-9")
                self.connection.close()
        return self._code

    def close(self) -> None:
        """Ask no more."""
        self.connection.close()


def write_client(path: Path, socket_path: Path) -> None:
    """Write the program that stands in for Python where Ray starts workers."""
    path.write_text(_CLIENT.format(python=sys.executable, socket=str(socket_path)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fork_command(
    socket_path: Path, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, log_path: Path
) -> Forked:
    """Begin `kikitori ARGUMENTS`, in a session of its own."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(socket_path))
    request = {"argv": ["kikitori", *arguments], "environment": dict(environment), "folder": str(folder)}
    with log_path.open("ab") as log, open(os.devnull, "rb") as nothing:
        descriptors = [nothing.fileno(), log.fileno(), log.fileno()]
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], descriptors)
        pid = int(connection.recv(64))
    return Forked(pid, connection)


@dataclass(frozen=True, slots=True)
class _Task:
    """What a child is to be."""

    argv: list[str]
    environment: dict[str, str]
    folder: str


def _serve(socket_path: str) -> _Task | None:
    """Fork a child per request; -> in a child, its task, and None in the parent when its standard input has ended."""
    children: dict[int, socket.socket] = {}
    wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, _do_nothing)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as selector:
        listening.bind(socket_path)
        listening.listen(128)
        for source in (listening.fileno(), wake_reader, 0):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wake_reader in ready:
                os.read(wake_reader, 4096)
                _report_ended(children)
            if 0 in ready and not os.read(0, 4096):
                return None
            if listening.fileno() in ready:
                connection, _ = listening.accept()
                request, descriptors = _receive(connection)
                pid = os.fork()
                if not pid:
                    _become(descriptors, [connection, *children.values()], (wake_reader, wake_writer))
                    return _Task(**request)
                for descriptor in descriptors:
                    os.close(descriptor)
                children[pid] = connection
                with contextlib.suppress(OSError):
                    connection.sendall(f"{pid}\n".encode())


def _do_nothing(number: int, frame: object) -> None:
    """A signal wakes the selector only if it has a handler."""
    del number, frame


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(_MAX_REQUEST_BYTES)
    return json.loads(data), descriptors


def _report_ended(children: dict[int, socket.socket]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with children.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(descriptors: Sequence[int], connections: Sequence[socket.socket], wake: tuple[int, int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    for descriptor in (*descriptors, *wake):
        os.close(descriptor)
    for connection in connections:
        connection.close()


def _do(task: _Task) -> None:
    from pipeline import failpoints

    os.chdir(task.folder)
    if task.argv[0] == "kikitori":
        os.setsid()
        _take_environment(task.environment)
        failpoints.arm(os.environ)
        _take_place({})
        sys.argv = task.argv
        from deploy.cli import main

        main()
        return
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.workers.setup_worker import parser

    setup, remaining = parser.parse_known_args(task.argv[1:])
    context = RuntimeEnvContext.deserialize(setup.serialized_runtime_env_context or "{}")
    _take_environment({**task.environment, **context.env_vars})
    failpoints.arm(os.environ)
    _take_place(task.environment)
    sys.argv = remaining
    runpy.run_path(remaining[0], run_name="__main__")


def _take_place(environment: Mapping[str, str]) -> None:
    """Ray read these as its library was loaded, from the parent's environment; nothing else can tell it others."""
    for name, address in _addresses.items():
        text = environment[name].zfill(len(_NOWHERE[name])) if name in environment else ""
        ctypes.memmove(address, text.encode() + b"\0", len(text) + 1)
        ctypes.memmove(address - 24, struct.pack("Q", len(text)), 8)


def _find(text: str) -> int:
    """Where Ray keeps these characters as a setting: a C++ string, after its length, its capacity, its users."""
    found: list[int] = []
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
        for line in maps:
            bounds, access = line.split()[:2]
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if not access.startswith("rw") or end - start > _MAX_REGION_BYTES:
                continue
            memory.seek(start)
            content = memory.read(end - start)
            for match in re.finditer(text.encode(), content):
                if content[match.start() - 24 : match.start() - 8] == struct.pack("QQ", len(text), len(text)):
                    found.append(start + match.start())
    if len(found) != 1:
        sys.exit("this Ray keeps its settings in another way; forks cannot be its workers")
    return found[0]


def _take_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", **_NOWHERE}
    for module in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    import gc

    import torch

    torch.set_num_threads(1)
    _addresses = {name: _find(text) for name, text in _NOWHERE.items()}
    gc.freeze()
    if (_task := _serve(sys.argv[1])) is not None:
        _do(_task)
