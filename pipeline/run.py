"""The one list of stages, built from a config; all of them in this process are the reference for every runner."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from models.checkpoint import Checkpoint
from models.mimi import MimiEncoder
from models.packing import pack
from pipeline.align import AlignStage
from pipeline.config import EncodeConfig, RunConfig, decoding_settings, fingerprint
from pipeline.encode import BatchEncodeStage, EncodeStage
from pipeline.errors import ConfigError
from pipeline.fetch import Fetched, open_fetched
from pipeline.generate import GenerateStage
from pipeline.load import LoadStage, Padding
from pipeline.messages import Failure, Source, Transcript
from pipeline.storage import Storage
from pipeline.write import Provenance

VERSION = "0.1.0"

# On a CPU a pass costs little more for eight streams than for one until the products stop being bound by memory.
_CPU_SLOTS = 8
_MAX_SLOTS = 256
# Measured on two cores with the demo checkpoint and 8 slots: 115, 202, 268, 232 RTFx at 1, 2, 4, 8. Fixed rather than
# adapted while working: passes of another width round differently, and rows would differ in the last digits.
_CPU_LOOKAHEAD = 4
_GPU_LOOKAHEAD = 1  # no figures from a GPU yet
# What a row costs is memory: SEANet's first layers hold 64 channels at 24 kHz, 6.1 MB per second of audio and tensor in
# float32, and about five such tensors at a time: 16 rows of 2 s are 32 s, 197 MB a tensor, 1 GB at the peak.
# What a long piece costs is the silence that fills up a stream's last one: frames computed for nothing, per useful
# frame, 3,000 clips of LibriSpeech's lengths with the padding of stt-2.6b-en and of stt-1b-en_fr:
#   frames of a piece     6     12     25     50    125
#   2.6b                1.7%   3.8%   8.3%  16.4%  36.9%
#   1b                  2.3%   5.1%  11.1%  23.1%  52.4%
_GPU_ROWS = 16
_ROW_PIECE_SECONDS = 2.0
_LONE_PIECE_SECONDS = 10.0  # the last piece of a stream that is encoded by itself is not filled up
# Of the GPU memory that is free after loading, the share given to KV caches; the rest is for activations.
_CACHE_SHARE = 0.6
_SMALL_MODEL_BYTES = 64 * 2**20

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Builds each stage of one run; every host builds only the stages it hosts."""

    config: RunConfig
    fetched: Fetched
    checkpoint: Checkpoint
    device: str

    def load(self) -> LoadStage:
        """Source -> Waveform."""
        longest_seconds = self.config.input.max_audio_hours * 3600
        return LoadStage(Storage(self.config.input.storage_options), self.padding(), longest_seconds=longest_seconds)

    def encode(self) -> EncodeStage | BatchEncodeStage:
        """Waveform -> Codes; reads the codec's weights."""
        encode = self.config.stages.encode
        mimi = self.checkpoint.load_mimi(device=self.device, window=encode.window)
        return encode_stage(mimi, encode)

    def generate(self) -> GenerateStage:
        """Codes -> Tokens; reads the decoder's weights."""
        generate = self.config.stages.generate
        decoder = pack(self.checkpoint.load_decoder(device=self.device, dtype=self._dtype()))
        return GenerateStage(
            decoder,
            self.checkpoint.speech,
            num_slots=self._num_slots(),
            lookahead=self._lookahead(),
            alignment=generate.alignment,
            temperature=generate.temperature,
            seed=generate.seed,
            keep_codes="codes" in self.config.output.columns,
        )

    def align(self) -> AlignStage:
        """Tokens -> Transcript; reads the tokenizer."""
        return AlignStage(
            self.checkpoint.load_tokenizer(),
            self.checkpoint.speech,
            frame_rate_hz=self.checkpoint.mimi.frame_rate_hz,
            alignment=self.config.stages.generate.alignment,
        )

    def provenance(self, run_id: str) -> Provenance:
        """What every row says about where it comes from."""
        return Provenance(
            model_id=self.fetched.model_id,
            model_revision=self.fetched.revision,
            config_fingerprint=fingerprint(self.settings()),
            version=VERSION,
            run_id=run_id,
        )

    def settings(self) -> dict[str, Any]:
        """Everything that can change a transcript."""
        dtype = str(self._dtype()).removeprefix("torch.")
        return decoding_settings(self.config, dtype=dtype, model_revision=self.fetched.revision, version=VERSION)

    def padding(self) -> Padding:
        """The silence that the checkpoint wants around the audio."""
        speech, mimi = self.checkpoint.speech, self.checkpoint.mimi
        return Padding(
            prefix_seconds=speech.prefix_seconds,
            delay_seconds=speech.delay_seconds,
            sampling_rate_hz=mimi.sample_rate_hz,
            samples_per_frame=mimi.frame_samples,
            repeat_first_frame=self.config.stages.generate.alignment == "first-frame-twice",
        )

    def _dtype(self) -> torch.dtype:
        return resolve_dtype(self.config.checkpoint.dtype, self.device)

    def _num_slots(self) -> int:
        slots = self.config.stages.generate.slots
        decoder = self.checkpoint.decoder
        bytes_per_slot = 2 * decoder.num_layers * decoder.dim * decoder.context * self._dtype().itemsize
        if slots != "auto":
            self._require_memory(slots, bytes_per_slot)
            return slots
        if not self.device.startswith("cuda"):
            return _CPU_SLOTS
        weight_bytes = sum(path.stat().st_size for path in self.checkpoint.decoder_files)
        free_bytes = torch.cuda.mem_get_info(self.device)[0] - weight_bytes
        return max(1, min(_MAX_SLOTS, int(free_bytes * _CACHE_SHARE) // bytes_per_slot))

    def _lookahead(self) -> int:
        lookahead = self.config.stages.generate.lookahead
        if lookahead != "auto":
            return lookahead
        return _GPU_LOOKAHEAD if self.device.startswith("cuda") else _CPU_LOOKAHEAD

    def num_threads(self) -> int:
        """Of torch, for all stages in one process. The products of a small model are over before a second thread is
        awake, and on a busy machine waiting for it cost 18 times (45 s against 2.5 s of encoding, two cores)."""
        is_small = sum(path.stat().st_size for path in self.checkpoint.decoder_files) < _SMALL_MODEL_BYTES
        return 1 if is_small else torch.get_num_threads()

    def _require_memory(self, slots: int, bytes_per_slot: int) -> None:
        on_gpu = self.device.startswith("cuda")
        memory = torch.cuda.mem_get_info(self.device)[1] if on_gpu else _physical_memory_bytes()
        if slots * bytes_per_slot > memory:
            raise ConfigError(
                f"stages.generate.slots is {slots}, at {bytes_per_slot / 2**20:.1f} MiB of KV cache each, but this "
                f"machine has memory for {memory // bytes_per_slot} at most; lower it or use auto"
            )


def encode_stage(mimi: MimiEncoder, config: EncodeConfig) -> EncodeStage | BatchEncodeStage:
    """The stage around a codec in float32, whose precision it sets.

    Raises:
        ConfigError: the codec's device does not have that precision.
    """
    device = mimi.downsample.weight.device.type
    check_precision(config, device)
    on_gpu = device == "cuda"
    rows = (_GPU_ROWS if on_gpu else 1) if config.rows == "auto" else config.rows
    automatic = _ROW_PIECE_SECONDS if rows > 1 else _LONE_PIECE_SECONDS
    seconds = automatic if config.piece_seconds == "auto" else config.piece_seconds
    mimi.set_precision(config.precision)
    if rows == 1:
        return EncodeStage(mimi, piece_seconds=seconds)
    return BatchEncodeStage(mimi, num_rows=rows, piece_seconds=seconds)


def check_precision(config: EncodeConfig, device: str) -> None:
    """Make sure that the device has the precision that is asked for.

    Raises:
        ConfigError: it does not.
    """
    if config.precision == "tf32" and not device.startswith("cuda"):
        raise ConfigError(
            f"stages.encode.precision is tf32, which only GPUs have, but the device is {device}; "
            "use float32 or bfloat16"
        )


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build_stages(config: RunConfig, fetched: Fetched) -> Stages:
    """Check that this machine can do what the config asks, and open the checkpoint.

    Raises:
        ConfigError: an option that is not available, or a device this machine does not have.
        CheckpointError: the checkpoint is incomplete or not one of ours.
    """
    return Stages(
        config=config,
        fetched=fetched,
        checkpoint=open_fetched(fetched),
        device=resolve_device(config.checkpoint.device),
    )


def resolve_device(device: str) -> str:
    """`auto` -> `cuda` if there is a GPU, else `cpu`.

    Raises:
        ConfigError: a GPU was asked for that is not there.
    """
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= num_gpus:
        count = f"{num_gpus} GPUs, counted from 0" if num_gpus else "no GPU"
        raise ConfigError(
            f"checkpoint.device is {device}, but torch {torch.__version__} finds {count}; use cpu or auto"
        )
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` -> bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return _DTYPES[dtype]


def transcribe(sources: Iterable[Source], stages: Stages) -> Iterator[Transcript | Failure]:
    """All stages in this process, one pulling from the next; results come as they are finished."""
    waveforms = stages.load().run(sources)
    codes = stages.encode().run(waveforms)
    tokens = stages.generate().run(codes)
    return stages.align().run(tokens)


def in_order(sources: Iterable[Source], results: Iterable[Transcript | Failure]) -> Iterator[Transcript | Failure]:
    """Put results back into the order of their sources; a result waits only for those before it."""
    held: dict[str, Transcript | Failure] = {}
    arriving = iter(results)
    for source in sources:
        while source.id not in held:
            result = next(arriving)
            held[result.source.id] = result
        yield held.pop(source.id)
