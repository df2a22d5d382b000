"""The verb `run`: plan, find what remains, do it on Ray, say how it went."""

import asyncio
import json
import logging
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.cluster import LaneRequest, connected, plan_lanes
from actors.driver import Driver, Progress
from actors.lane import LaneSettings
from actors.progress import show
from pipeline.config import RunConfig, fingerprint, require_output_uri
from pipeline.errors import ConfigError, SystemFailure
from pipeline.fetch import DEMO, fetch
from pipeline.plan import committed, make_plan, remaining
from pipeline.run import Stages, build_stages
from pipeline.status import Status, status_of
from pipeline.storage import Storage, is_local, join, normalise
from pipeline.write import check_columns

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a run ended."""

    run_id: str
    output_uri: str
    status: Status
    num_shards_done: int  # by this run
    audio_seconds: float  # by this run
    wall_seconds: float
    num_lost_lanes: int
    ignored: Mapping[str, int]
    signal: int | None = None  # the signal that stopped it, if one did

    @property
    def rtfx(self) -> float:
        """Audio seconds per wall second of this run, start of Ray and models included."""
        return self.audio_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def exit_code(self) -> int:
        """As the command line promises: 0 all transcribed, 1 some error rows, 128 + signal when stopped."""
        if self.signal is not None:
            return 128 + self.signal
        return 1 if self.status.num_errors else 0


def run_job(config: RunConfig, console: Console) -> JobResult:
    """Do what remains of a config's inputs.

    Raises:
        ConfigError: before any work, if the config, the checkpoint, the inputs or the output do not allow it.
        SystemFailure: if the run cannot go on; what is committed stays.
    """
    begun = time.monotonic()
    config = _anywhere(config)
    output = Storage(config.output.storage_options)
    output_uri = require_output_uri(config)
    check_columns(config.output.columns)
    pinned = fetch(config.checkpoint)
    # On a cluster the GPUs are elsewhere; what this machine lacks is for the lanes to say.
    stages = build_stages(_on(config, "cpu"), pinned)
    _check_settings(config, stages, output, output_uri)
    plan = make_plan(config, Storage(config.input.storage_options), output)
    todo = remaining(plan, committed(output_uri, output))
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    logger.info("run %s: %d inputs, %d of %d shards to do", run_id, plan.num_inputs, len(todo), len(plan.shards))
    progress = Progress(num_inputs=sum(len(shard.sources) for shard in todo))
    stopped_by = None
    if todo:
        with connected(config):
            request, num_lanes = plan_lanes(config)
            stages = replace(stages, config=_on(config, request.device), device=request.device)
            _record_settings(config, stages, output, output_uri)
            settings = _lane_settings(stages, request, run_id)
            driver = Driver(config, settings, request, num_lanes=num_lanes, shards=todo, progress=progress)
            seconds = sum(shard.estimated_seconds for shard in todo)
            stopped_by = asyncio.run(_drive(driver, progress, seconds, console))
    return JobResult(
        run_id=run_id,
        output_uri=output_uri,
        status=_final_status(stopped_by, status_of(plan, output_uri, output)),
        num_shards_done=len(todo) - len(remaining(plan, committed(output_uri, output))),
        audio_seconds=progress.audio_seconds,
        wall_seconds=time.monotonic() - begun,
        num_lost_lanes=progress.num_lost_lanes,
        ignored=plan.ignored,
        signal=stopped_by,
    )


async def _drive(driver: Driver, progress: Progress, total_seconds: float, console: Console) -> int | None:
    """Run the driver under a progress line; -> the signal that stopped it, if any."""
    stopped_by: list[int] = []

    def stop(number: int) -> None:
        stopped_by.append(number)
        driver.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs its own
        loop.add_signal_handler(number, stop, number)
    work = asyncio.create_task(driver.run())
    display = asyncio.create_task(show(progress, total_seconds=total_seconds, console=console, stop=work.done))
    try:
        await work
    finally:
        await display
    return stopped_by[0] if stopped_by else None


def _on(config: RunConfig, device: str) -> RunConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"device": device})})


def _anywhere(config: RunConfig) -> RunConfig:
    """The config with local paths made absolute: workers run in other folders than the command."""
    checkpoint = config.checkpoint
    source = checkpoint.source
    if "://" not in source and Path(source).expanduser().is_dir() and source != DEMO:
        checkpoint = checkpoint.model_copy(update={"source": str(Path(source).expanduser().resolve())})
    output = config.output
    if output.uri and is_local(output.uri):
        output = output.model_copy(update={"uri": normalise(output.uri)})
    return config.model_copy(update={"checkpoint": checkpoint, "output": output})


def _lane_settings(stages: Stages, request: LaneRequest, run_id: str) -> LaneSettings:
    return LaneSettings(
        config=stages.config,
        run_id=run_id,
        model_revision=stages.fetched.revision,
        padding=stages.padding(),
        num_loaders=request.num_loaders,
        loader_cpus=request.loader_cpus,
        num_threads=request.num_threads,
    )


def _final_status(stopped_by: int | None, status: Status) -> Status:
    if stopped_by is None and not status.is_complete:
        missing = status.num_shards - status.num_committed_shards
        raise SystemFailure(f"the run ended with {missing} shards not committed; run the same command again")
    return status


def _settings_uri(output_uri: str) -> str:
    return join(output_uri, "_kikitori", "settings.json")


def _settings(config: RunConfig, stages: Stages) -> dict[str, Any]:
    """What all parts of an output have in common: the way of decoding, and the columns."""
    return stages.settings() | {"output.columns": sorted(config.output.columns)}


def _check_settings(config: RunConfig, stages: Stages, storage: Storage, output_uri: str) -> None:
    """One output, one way of decoding, one set of columns.

    Raises:
        ConfigError: parts are there that were made with other settings; the differences are named.
        SystemFailure: the earlier record cannot be read.
    """
    earlier = _recorded_settings(storage, output_uri)
    if earlier is None or not committed(output_uri, storage):
        return
    now = _settings(config, stages)
    if config.checkpoint.dtype == "auto" and config.checkpoint.device != "cpu" and not ray.is_initialized():
        now["checkpoint.dtype"] = earlier.get("checkpoint.dtype")  # known when the lanes' device is
    differences = [
        f"{key}: {earlier.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*earlier, *now})
        if earlier.get(key) != now.get(key)
    ]
    if differences:
        raise ConfigError(
            f"{output_uri} holds transcripts made with other settings:\n  "
            + "\n  ".join(differences)
            + "\nGo back to those settings, or choose another output.uri"
        )


def _record_settings(config: RunConfig, stages: Stages, storage: Storage, output_uri: str) -> None:
    """Write down how the parts are made, now that the lanes' device is known; the first run's record stays.

    Raises:
        ConfigError: another run has begun here with other settings.
    """
    settings = _settings(config, stages)
    record = json.dumps({"config_fingerprint": fingerprint(stages.settings()), "settings": settings}, indent=2)
    if not committed(output_uri, storage):
        storage.overwrite(_settings_uri(output_uri), record.encode())
        storage.overwrite(join(output_uri, "_kikitori", "config.yaml"), config.to_yaml().encode())
    _check_settings(config, stages, storage, output_uri)


def _recorded_settings(storage: Storage, output_uri: str) -> dict[str, Any] | None:
    uri = _settings_uri(output_uri)
    try:
        found = json.loads(storage.read_bytes(uri))["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise SystemFailure(
            f"{uri} is damaged: it does not hold the settings of the output; restore or delete it"
        ) from None
    return found if isinstance(found, dict) else None
