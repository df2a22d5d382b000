"""The verb `run`: plan, find what remains, do it on Ray, say how it went."""

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.alarm import Alarm
from actors.cluster import LaneRequest, connected, plan_lanes
from actors.driver import Driver, Progress
from actors.journal import Journal
from actors.lane import LaneSettings
from actors.progress import show
from pipeline.config import RunConfig, require_output_uri
from pipeline.errors import ERROR_CODES, ConfigError, SystemFailure
from pipeline.fetch import DEMO, fetch
from pipeline.manifests import load_shard
from pipeline.plan import Plan, committed, make_plan
from pipeline.run import Stages, build_stages
from pipeline.status import Status, Work, quick_status_of, status_of, work_of
from pipeline.storage import Storage, is_local, join, normalise
from pipeline.versions import COLUMNS, Version, check_settings, read_versions, record_version
from pipeline.write import check_columns

logger = logging.getLogger(__name__)

_STOPPED_BY = (signal.SIGINT, signal.SIGTERM)
_MAX_FOOTERS_WHEN_STOPPED = 2_000  # 3 s on an object store; after a SIGTERM there are ten, once the lanes are drained


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What may be asked of one run beside its config."""

    new_version: bool = False  # the settings may differ from those in force; then every input is done again
    retry_codes: frozenset[str] = frozenset()  # inputs whose rows carry these error codes are done again
    max_error_rate: float | None = None  # errors per finished input; more of them end the run


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


def retry_codes(text: str) -> frozenset[str]:
    """The error codes named in `CODE,CODE`, or `all`.

    Raises:
        ConfigError: one of them does not exist.
    """
    named = [part.strip() for part in text.split(",")]
    if named == ["all"]:
        return frozenset(ERROR_CODES)
    unknown = [code for code in named if code not in ERROR_CODES]
    if unknown:
        raise ConfigError(
            f"--retry-errors: found {', '.join(map(repr, unknown))}; the error codes are {', '.join(ERROR_CODES)}, "
            "or say all"
        )
    return frozenset(named)


def run_job(config: RunConfig, console: Console, options: RunOptions | None = None) -> JobResult:
    """Do what remains of a config's inputs.

    Raises:
        ConfigError: before any work, if the config, the checkpoint, the inputs or the output do not allow it.
        SystemFailure: if the run cannot go on; what is committed stays.
    """
    begun = time.monotonic()
    options = options or RunOptions()
    config = _anywhere(config)
    output_uri = require_output_uri(config)
    check_columns(config.output.columns)
    output = Storage(config.output.storage_options).probe(output_uri)
    output.remove_leftovers(output_uri)
    pinned = fetch(config.checkpoint)
    # On a cluster the GPUs are elsewhere; what this machine lacks is for the lanes to say.
    stages = build_stages(_on(config, "cpu"), pinned)
    versions = read_versions(output_uri, output)
    settings = _settings_before_lanes(stages, config, versions)
    if not options.new_version:
        check_settings(settings, versions, output_uri=output_uri)
    plan = make_plan(config, Storage(config.input.storage_options), output)
    work = work_of(plan, output_uri, output, versions=versions, retry_codes=options.retry_codes)
    job = _Job(config=config, options=options, output=output, plan=plan, run_id=_new_run_id())
    progress = Progress(num_inputs=work.num_inputs)
    stopped_by = None
    may_be_new = options.new_version and not (versions and versions[-1].settings == settings and _knows_dtype(config))
    if work.shards or may_be_new:
        with connected(config):
            stopped_by = job.run(stages, versions, work, progress, console)
    return JobResult(
        run_id=job.run_id,
        output_uri=output_uri,
        status=_final_status(plan, output_uri, output, stopped_by=stopped_by),
        num_shards_done=progress.num_shards,
        audio_seconds=progress.audio_seconds,
        wall_seconds=time.monotonic() - begun,
        num_lost_lanes=progress.num_lost_lanes,
        ignored=plan.ignored,
        signal=stopped_by,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What stays the same from the plan to the end."""

    config: RunConfig
    options: RunOptions
    output: Storage
    plan: Plan
    run_id: str

    @property
    def _output_uri(self) -> str:
        return self.config.output.uri

    def run(
        self, stages: Stages, versions: Sequence[Version], work: Work, progress: Progress, console: Console
    ) -> int | None:
        """Do the work on a Ray that is up; -> the signal that stopped it, if any."""
        request, num_lanes = plan_lanes(self.config)
        stages = replace(stages, config=_on(self.config, request.device), device=request.device)
        version = self._put_in_force(_settings(stages), versions)
        if version not in versions:
            work = self._work([*versions, version])
            progress.num_inputs = work.num_inputs
        logger.info(
            "run %s: %d inputs in %d of %d shards to do",
            self.run_id,
            work.num_inputs,
            len(work.shards),
            len(self.plan.shards),
        )
        driver = Driver(
            _lane_settings(stages, request, self),
            version,
            request,
            num_lanes=num_lanes,
            shards=work.shards,
            load_shard=partial(load_shard, storage=self.output),
            retry_codes=self.options.retry_codes,
            journal=Journal(self.output, self._output_uri, version.config_fingerprint),
            alarm=Alarm(self.options.max_error_rate, num_inputs=work.num_inputs),
            progress=progress,
        )
        try:
            with _handlers_kept():
                return asyncio.run(_drive(driver, progress, work.estimated_seconds, console))
        except SystemFailure as error:
            raise type(error)(f"{error}. {self._what_is_committed(work)}") from None

    def _work(self, versions: Sequence[Version]) -> Work:
        codes = self.options.retry_codes
        return work_of(self.plan, self._output_uri, self.output, versions=versions, retry_codes=codes)

    def _put_in_force(self, settings: Mapping[str, Any], versions: Sequence[Version]) -> Version:
        """Write down how the parts are made, now that the lanes' device is known."""
        if not self.options.new_version:
            check_settings(settings, versions, output_uri=self._output_uri)
        version = record_version(settings, versions, output_uri=self._output_uri, storage=self.output)
        if version not in versions:
            config_uri = join(self._output_uri, "_kikitori", "config.yaml")
            self.output.overwrite(config_uri, self.config.to_yaml().encode())
        return version

    def _what_is_committed(self, work: Work) -> str:
        there = committed(self._output_uri, self.output)
        num_there = sum(shard.id in there for shard in self.plan.shards)
        return f"{num_there} of {len(self.plan.shards)} shards are committed and stay; run again to do what remains"


def _new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def _handlers_kept() -> Generator[None]:
    """Put back what a signal does; a closed event loop leaves the default, by which SIGTERM ends a process at once."""
    before = {number: signal.getsignal(number) for number in _STOPPED_BY}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _drive(driver: Driver, progress: Progress, total_seconds: float, console: Console) -> int | None:
    """Run the driver under a progress line; -> the signal that stopped it, if any."""
    stopped_by: list[int] = []

    def stop(number: int) -> None:
        stopped_by.append(number)
        driver.stop()

    loop = asyncio.get_running_loop()
    for number in _STOPPED_BY:  # after ray.init, which installs its own
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


def _lane_settings(stages: Stages, request: LaneRequest, job: _Job) -> LaneSettings:
    return LaneSettings(
        config=stages.config,
        run_id=job.run_id,
        model_revision=stages.fetched.revision,
        padding=stages.padding(),
        num_loaders=request.num_loaders,
        loader_cpus=request.loader_cpus,
        num_threads=request.num_threads,
        conditional_puts=job.output.conditional_puts,
    )


def _final_status(plan: Plan, output_uri: str, output: Storage, *, stopped_by: int | None) -> Status:
    if stopped_by is not None and len(plan.shards) > _MAX_FOOTERS_WHEN_STOPPED:
        return quick_status_of(plan, output_uri, output)
    status = status_of(plan, output_uri, output)
    if stopped_by is None and not status.is_complete:
        missing = status.num_shards - status.num_committed_shards
        raise SystemFailure(f"the run ended with {missing} shards not committed; run the same command again")
    return status


def _settings(stages: Stages) -> dict[str, Any]:
    """What all parts of an output have in common: the way of decoding, and the columns."""
    return stages.settings() | {COLUMNS: sorted(stages.config.output.columns)}


def _knows_dtype(config: RunConfig) -> bool:
    """Whether it is known before the lanes' device is."""
    return config.checkpoint.dtype != "auto" or config.checkpoint.device == "cpu"


def _settings_before_lanes(stages: Stages, config: RunConfig, versions: Sequence[Version]) -> dict[str, Any]:
    """The settings as far as they are known before the lanes' device is."""
    settings = _settings(stages)
    if versions and not _knows_dtype(config):
        settings["checkpoint.dtype"] = versions[-1].settings.get("checkpoint.dtype")
    return settings
