"""Ray itself: start or join it, and what one lane asks of it."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before `import ray`, which reads them: no usage reports from users' clusters, no warning about hidden GPUs.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, SystemFailure
from pipeline.run import check_precision

# More loaders than this do not feed one GPU any better: one core decodes 200-900 h of audio per hour.
_MAX_LOADERS = 8
_CONNECT_ERRORS = (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRequest:
    """What one lane reserves, in one placement group on one node."""

    device: str
    num_loaders: int
    loader_cpus: float
    encoder_gpus: float
    decoder_gpus: float
    num_threads: int

    @property
    def bundle(self) -> dict[str, float]:
        """The placement group's only bundle."""
        resources = {"CPU": self.num_loaders * self.loader_cpus}
        if self.encoder_gpus + self.decoder_gpus > 0:
            resources["GPU"] = self.encoder_gpus + self.decoder_gpus
        return resources


@contextmanager
def connected(config: RunConfig) -> Generator[None]:
    """Join the configured cluster or start a local one, and leave it again.

    Raises:
        SystemFailure: there is no cluster at the address, or a local Ray does not come up.
    """
    if ray.is_initialized():  # a caller's own, as in tests: not ours to stop
        yield
        return
    # Ray puts the folder it is started in before everything else on its workers' import path, where a `models/` of the
    # user's would hide ours.
    started_in = Path(__file__).parent.parent
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray.address is None:
        options |= {"include_dashboard": False}
    try:
        with contextlib.chdir(started_in), _signals_after():
            ray.init(address=config.ray.address or "local", **options)
    except _CONNECT_ERRORS as error:
        where = config.ray.address or "a local Ray"
        raise SystemFailure(f"ray.address {where}: could not be reached or started: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_after() -> Generator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block: a Ray interrupted half-way leaves processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda n, _: held.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:  # of the handler that Ray puts in our place half-way
        if error.code != signal.SIGTERM:
            raise
        held.append(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        ray.shutdown()
        signal.raise_signal(held[0])


def plan_lanes(config: RunConfig) -> tuple[LaneRequest, int]:
    """What each lane asks for, and how many there should be, given the cluster as it is now.

    Raises:
        ConfigError: the config asks for GPUs and the cluster has none, or for more CPUs than any node has.
    """
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    device = config.checkpoint.device
    if device.startswith("cuda:"):
        raise ConfigError(f"checkpoint.device is {device}, but Ray chooses the GPU of each lane; use cuda or auto")
    if device == "cuda" and not num_gpus:
        raise ConfigError(f"checkpoint.device is {device}, but the cluster has no GPU; use cpu or auto")
    on_gpu = num_gpus > 0 and device != "cpu"
    check_precision(config.stages.encode, "cuda" if on_gpu else "cpu")
    request = _gpu_lane(config, nodes) if on_gpu else _cpu_lane(config, nodes)
    if config.ray.address is None and not any(_fits(request.bundle, node) for node in nodes):
        raise ConfigError(f"a lane needs {request.bundle} on one node, but this machine has {_offers(nodes)}")
    wanted = config.ray.lanes
    if wanted == "auto":
        per_gpu = request.encoder_gpus + request.decoder_gpus
        wanted = max(1, int(num_gpus / per_gpu)) if on_gpu else sum(node.get("CPU", 0) >= 1 for node in nodes)
    return request, max(1, wanted)


def _fits(bundle: dict[str, float], node: dict[str, float]) -> bool:
    return all(amount <= node.get(kind, 0) for kind, amount in bundle.items())


def _offers(nodes: list[dict[str, float]]) -> str:
    return " and ".join(str({kind: node[kind] for kind in ("CPU", "GPU") if kind in node}) for node in nodes)


def _gpu_lane(config: RunConfig, nodes: list[dict[str, float]]) -> LaneRequest:
    stages = config.stages
    gpus = stages.encode.gpus + stages.generate.gpus
    if gpus <= 0:
        raise ConfigError(
            "stages.encode.gpus and stages.generate.gpus are 0, but checkpoint.device resolves to a GPU; "
            "give them shares (0.2 and 0.8), or set checkpoint.device: cpu"
        )
    host = next(node for node in nodes if node.get("GPU", 0) > 0)
    lanes_per_node = max(1.0, host["GPU"] / gpus)
    cpus_per_lane = host.get("CPU", 1) / lanes_per_node
    loader_cpus = _loader_cpus(config, nodes)
    automatic = max(1, min(_MAX_LOADERS, int((cpus_per_lane - 1) / loader_cpus)))
    return LaneRequest(
        device="cuda",
        num_loaders=automatic if stages.load.actors == "auto" else stages.load.actors,
        loader_cpus=loader_cpus,
        encoder_gpus=stages.encode.gpus,
        decoder_gpus=stages.generate.gpus,
        num_threads=1,  # tensors are on the GPU; threads would only steal cores from the loaders
    )


def _cpu_lane(config: RunConfig, nodes: list[dict[str, float]]) -> LaneRequest:
    # Encoder and decoder reserve no CPU, so that a lane fits on one core too; torch gets half the node in each.
    cores = int(max(node.get("CPU", 1) for node in nodes))
    actors = config.stages.load.actors
    return LaneRequest(
        device="cpu",
        num_loaders=1 if actors == "auto" else actors,
        loader_cpus=_loader_cpus(config, nodes),
        encoder_gpus=0,
        decoder_gpus=0,
        num_threads=max(1, cores // 2),
    )


def _loader_cpus(config: RunConfig, nodes: list[dict[str, float]]) -> float:
    wanted, most = config.stages.load.cpus, max(node.get("CPU", 0) for node in nodes)
    if wanted > most:
        raise ConfigError(f"stages.load.cpus is {wanted:g}, but no node of the cluster has more than {most:g}")
    return wanted
