"""What `kikitori bench` measures: the engine over slots and look-ahead, then the stages in one process beside it.

The engine is bound by the memory bus or by arithmetic (`models/roofline.py`); the pipeline by the engine, as long as
loading and encoding cost less. Both are measured on the same codes, in turns.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.config import SpeechConfig
from models.decoder import Decoder
from models.mimi import MimiEncoder
from models.packing import pack
from models.roofline import Machine, num_parameters
from models.shapes import SHAPES, random_decoder, random_mimi
from pipeline.config import RunConfig
from pipeline.discover import discover
from pipeline.encode import BatchEncodeStage, EncodeStage
from pipeline.errors import ConfigError
from pipeline.fetch import fetch
from pipeline.generate import GenerateStage
from pipeline.messages import Failure, Source, Waveform
from pipeline.run import Stages, build_stages, encode_stage, resolve_device, resolve_dtype
from pipeline.speed import Point, Ride, one_ride, probe, sweep
from pipeline.storage import Storage
from pipeline.workload import MIXES, Clips, Workload, make_workload, noise, random_clips

Stream = Iterator[Waveform | Failure]

# Synthetic audio for the pipeline is made before the clock starts, and an hour of it weighs 346 MB.
_MOST_AUDIO_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Args:
        num_slots: every one of them is measured with every one of `lookaheads`.
        mix: synthetic clips of these lengths; None for the config's inputs.
        num_clips: how many of them.
        longest_seconds: synthetic clips are cut to this.
        shape: random weights of this shape instead of the config's checkpoint.
    """

    num_slots: tuple[int, ...]
    lookaheads: tuple[int, ...]
    mix: str | None
    num_clips: int
    longest_seconds: float | None
    shape: str | None
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """The stages once through the clips."""

    wall_seconds: float
    stage_seconds: dict[str, float]  # spent inside each stage, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured."""

    model: str
    num_parameters: int
    device: str
    dtype: str
    clips: Clips
    machine: Machine
    points: tuple[Point, ...]
    best: Point  # of the sweep, by RTFx; the pipeline runs with its slots and look-ahead
    pipeline: tuple[PipelineRun, ...]
    bare: tuple[Ride, ...]  # the engine on the pipeline's codes
    pipeline_clips: Clips

    @property
    def pipeline_rtfx(self) -> float:
        """Seconds of speech per wall second, all stages in one process."""
        return self.pipeline_clips.credited_seconds / median(run.wall_seconds for run in self.pipeline)

    @property
    def bare_rtfx(self) -> float:
        """Seconds of speech per wall second of the engine on the same codes."""
        return self.pipeline_clips.credited_seconds / median(ride.wall_seconds for ride in self.bare)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Median seconds inside each stage."""
        return {
            name: median(run.stage_seconds[name] for run in self.pipeline) for name in self.pipeline[0].stage_seconds
        }

    def as_json(self) -> dict[str, Any]:
        """One object for scripts; seconds are seconds, RTFx is credited unless it says `step`."""
        padded = self.pipeline_clips.step_seconds / self.pipeline_clips.credited_seconds
        return {
            "model": self.model,
            "parameters": self.num_parameters,
            "device": self.device,
            "dtype": self.dtype,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": {
                "gigabytes_per_second": round(self.machine.bytes_per_second / 1e9, 2),
                "gigaflops_per_second": round(self.machine.flops_per_second / 1e9, 1),
            },
            "workload": {
                "name": self.clips.name,
                "clips": len(self.clips.codes),
                "credited_seconds": round(self.clips.credited_seconds, 2),
                "step_seconds": round(self.clips.step_seconds, 2),
            },
            "engine": [point.as_json() for point in self.points],
            "pipeline": {
                "slots": self.best.num_slots,
                "lookahead": self.best.lookahead,
                "clips": len(self.pipeline_clips.codes),
                "credited_seconds": round(self.pipeline_clips.credited_seconds, 2),
                "rtfx": round(self.pipeline_rtfx, 2),
                "step_rtfx": round(self.pipeline_rtfx * padded, 2),
                "bare_engine_rtfx": round(self.bare_rtfx, 2),
                "of_bare_engine": round(self.pipeline_rtfx / self.bare_rtfx, 4),
                "wall_seconds": [round(run.wall_seconds, 4) for run in self.pipeline],
                "bare_engine_wall_seconds": [round(ride.wall_seconds, 4) for ride in self.bare],
                "stage_seconds": {name: round(seconds, 4) for name, seconds in self.stage_seconds.items()},
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is measured; `stages` only if there is a checkpoint behind it."""

    name: str
    decoder: Decoder
    mimi: MimiEncoder
    speech: SpeechConfig
    stages: Stages | None


@dataclass(slots=True)
class Stopwatch:
    """Passes messages on and counts the time they take to come."""

    inbox: Iterator[Any]
    seconds: float = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        try:
            return next(self.inbox)
        finally:
            self.seconds += time.perf_counter() - begun


def bench(config: RunConfig, options: BenchOptions, *, on_step: Callable[[str], None] = lambda _: None) -> Report:
    """Measure, saying through `on_step` what is being done.

    Raises:
        ConfigError: the options contradict each other, or there is nothing to transcribe.
    """
    _check(config, options)
    on_step("building the model")
    model = _open_model(config, options)
    decoder, padding_id = model.decoder, model.speech.padding_id
    on_step("measuring the memory bus and arithmetic")
    machine = probe(decoder.config, device=decoder.device, dtype=decoder.dtype)
    workload = _workload(options, model)
    open_audio = _audio(config, options, model, workload)
    on_step("encoding")
    heard = _clips(config, model, open_audio(), name=options.mix or "inputs")  # also the encoder's warm-up
    clips = heard if workload is None else random_clips(workload, mimi=model.mimi.config)
    points = sweep(
        decoder,
        clips,
        num_slots=options.num_slots,
        lookaheads=options.lookaheads,
        repeats=options.repeats,
        padding_id=padding_id,
        machine=machine,
        on_ride=lambda slots, lookahead: on_step(f"engine: {slots} slots, look-ahead {lookahead}"),
    )
    best = max(points, key=lambda point: point.rtfx)
    pipeline: list[PipelineRun] = []
    bare: list[Ride] = []
    on_step("pipeline, and in turns with it the engine alone on the same codes")
    for _ in range(options.repeats):
        pipeline.append(_run_pipeline(config, model, open_audio(), best))
        bare.append(one_ride(decoder, heard, best.num_slots, best.lookahead, padding_id=padding_id))
    return Report(
        model=model.name,
        num_parameters=num_parameters(decoder.config),
        device=device_name(decoder.device),
        dtype=str(decoder.dtype).removeprefix("torch."),
        clips=clips,
        machine=machine,
        points=tuple(points),
        best=best,
        pipeline=tuple(pipeline),
        bare=tuple(bare),
        pipeline_clips=heard,
    )


def device_name(device: torch.device) -> str:
    """`cpu`, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check(config: RunConfig, options: BenchOptions) -> None:
    if options.shape is not None and options.shape not in SHAPES:
        raise ConfigError(f"--shape is {options.shape}; known are {', '.join(SHAPES)}")
    if options.mix is not None and options.mix not in MIXES:
        raise ConfigError(f"--mix is {options.mix}; known are {', '.join(MIXES)}")
    if config.stages.generate.temperature > 0 or config.stages.generate.alignment != "all-frames":
        raise ConfigError("bench measures greedy decoding of all frames; leave temperature and alignment as they are")
    if options.shape is not None and options.mix is None:
        raise ConfigError("random weights hear nothing in real speech; give --shape a --mix as well")


def _open_model(config: RunConfig, options: BenchOptions) -> _Model:
    device = resolve_device(config.checkpoint.device)
    dtype = resolve_dtype(config.checkpoint.dtype, device)
    if options.shape is None:
        stages = build_stages(config, fetch(config.checkpoint))
        return _Model(
            name=stages.fetched.model_id,
            decoder=pack(stages.checkpoint.load_decoder(device=device, dtype=dtype)),
            mimi=stages.checkpoint.load_mimi(device=device, window=config.stages.encode.window),
            speech=stages.checkpoint.speech,
            stages=stages,
        )
    shape = SHAPES[options.shape]
    return _Model(
        name=f"random weights of shape {options.shape}",
        decoder=pack(random_decoder(shape.decoder, device=device, dtype=dtype)),
        mimi=random_mimi(shape.mimi, device=device),
        speech=shape.speech,
        stages=None,
    )


def _workload(options: BenchOptions, model: _Model) -> Workload | None:
    """The synthetic clips; None where the config's inputs are measured."""
    if options.mix is None:
        return None
    return make_workload(
        options.mix,
        num_clips=options.num_clips,
        speech=model.speech,
        frame_rate_hz=model.mimi.config.frame_rate_hz,
        longest_seconds=options.longest_seconds,
    )


def _audio(config: RunConfig, options: BenchOptions, model: _Model, workload: Workload | None) -> Callable[[], Stream]:
    """How to begin the audio anew: the load stage over the inputs, or noise that is there already."""
    if workload is None:
        assert model.stages is not None  # `_check`: random weights come with a mix
        stages, sources = model.stages, _sources(config, options.num_clips)
        return lambda: stages.load().run(sources)
    cut = workload.first(_MOST_AUDIO_SECONDS)
    waveforms = list(noise(cut, mimi=model.mimi.config, prefix_seconds=model.speech.prefix_seconds))
    return lambda: iter(waveforms)


def _sources(config: RunConfig, num_clips: int) -> list[Source]:
    found = discover(config.input.uris, Storage(config.input.storage_options)).found
    if not found:
        raise ConfigError("the config names no inputs; name some in input.uris, or measure synthetic clips with --mix")
    return [candidate.source for candidate in found[:num_clips]]


def _clips(config: RunConfig, model: _Model, audio: Stream, *, name: str) -> Clips:
    """The codes of everything that can be heard."""
    pieces: dict[str, list[NDArray[np.int16]]] = {}
    credited_seconds = 0.0
    for message in _encode_stage(config, model).run(audio):
        if isinstance(message, Failure):
            pieces.pop(message.source.id, None)
            continue
        pieces.setdefault(message.source.id, []).append(message.codes)
        if message.is_last and message.facts is not None:
            credited_seconds += message.facts.duration_seconds or 0.0
    if not pieces:
        raise ConfigError("not one of the inputs could be read; `kikitori transcribe` on one of them says why")
    return Clips(
        name=name,
        codes=tuple(np.concatenate(parts, axis=1) for parts in pieces.values()),
        credited_seconds=credited_seconds,
        frame_rate_hz=model.mimi.config.frame_rate_hz,
    )


def _encode_stage(config: RunConfig, model: _Model) -> EncodeStage | BatchEncodeStage:
    return encode_stage(model.mimi, config.stages.encode)


def _run_pipeline(config: RunConfig, model: _Model, audio: Stream, best: Point) -> PipelineRun:
    """All stages once, each pulling from the one before, the way `transcribe` does it."""
    generate = GenerateStage(model.decoder, model.speech, num_slots=best.num_slots, lookahead=best.lookahead)
    begun = time.perf_counter()
    watches = {"load": Stopwatch(audio)}
    watches["encode"] = Stopwatch(_encode_stage(config, model).run(watches["load"]))
    watches["generate"] = Stopwatch(generate.run(watches["encode"]))
    if model.stages is not None:
        watches["align"] = Stopwatch(model.stages.align().run(watches["generate"]))
    last = watches["align" if "align" in watches else "generate"]
    deque(last, maxlen=0)
    wall_seconds = time.perf_counter() - begun
    inclusive = [0.0, *(watch.seconds for watch in watches.values())]
    own = [after - before for before, after in pairwise(inclusive)]
    return PipelineRun(wall_seconds=wall_seconds, stage_seconds=dict(zip(watches, own, strict=True)))
