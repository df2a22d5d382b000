"""What a person may ask for: YAML text and `-s key=value` overrides in, one frozen `RunConfig` out.

Every default lives here and nowhere else. A key nobody knows is refused with the nearest one that exists.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError

Alignment = Literal["all-frames", "bos-replaces-first", "first-frame-twice"]
Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointConfig(_Section):
    """Which weights, and how they are held."""

    source: str = "kyutai/stt-2.6b-en"  # hub id, local folder, fsspec URI, or `demo`
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


class InputConfig(_Section):
    """Where the audio is, and how much of it one output file holds."""

    uris: list[str] = []
    shard_audio_hours: float = Field(default=1.0, gt=0)
    storage_options: dict[str, Any] = {}  # handed to fsspec as they are; never logged, never written to the output


class OutputConfig(_Section):
    """Where the transcripts go."""

    uri: str = ""
    columns: list[Literal["tokens", "codes", "audio"]] = []
    storage_options: dict[str, Any] = {}


class LoadConfig(_Section):
    """Decoding and resampling, on CPUs."""

    cpus: float = Field(default=1, gt=0)  # of one load actor
    actors: Auto | PositiveInt = "auto"  # per lane; auto: what the lane's share of the machine allows


class EncodeConfig(_Section):
    """Audio to Mimi codes."""

    gpus: float = Field(default=0.2, ge=0)
    # exact: every latent sees the whole window.
    # ring: moshi's streaming encoder, where the first latent of a frame sees one less.
    window: Literal["exact", "ring"] = "exact"
    piece_seconds: float = Field(default=10.0, gt=0)  # audio encoded in one call; bounds memory, changes no code


class GenerateConfig(_Section):
    """Codes to text tokens."""

    gpus: float = Field(default=0.8, ge=0)
    slots: Auto | PositiveInt = "auto"  # streams that share one pass over the weights
    lookahead: Auto | PositiveInt = "auto"
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0
    alignment: Alignment = "all-frames"


class StagesConfig(_Section):
    """One section per stage that has something to set."""

    load: LoadConfig = LoadConfig()
    encode: EncodeConfig = EncodeConfig()
    generate: GenerateConfig = GenerateConfig()


class ServeConfig(_Section):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: list[str] = []  # hashes of the accepted keys; empty: no key needed


class RayConfig(_Section):
    """Which cluster, and how many lanes on it."""

    address: str | None = None  # null: start a local Ray; "auto" or ray://...: join a cluster
    lanes: Auto | PositiveInt = "auto"  # auto: one per GPU, or one where there is none


class RunConfig(_Section):
    """A whole config file."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    stages: StagesConfig = StagesConfig()
    serve: ServeConfig = ServeConfig()
    ray: RayConfig = RayConfig()

    def to_yaml(self) -> str:
        """The complete config, defaults included; values of `storage_options` are hidden, they may be secrets."""
        data = self.model_dump(mode="json")
        for section in ("input", "output"):
            options: dict[str, Any] = data[section]["storage_options"]
            data[section]["storage_options"] = dict.fromkeys(options, "***")
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides; the value of an override is YAML too.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a key or value that is not accepted.
    """
    data = _read(path) if path is not None else {}
    for override in overrides:
        _apply(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, where=path or "the command line")) from None


def decoding_settings(config: RunConfig, *, model_revision: str, version: str) -> dict[str, Any]:
    """Everything that can change a transcript: weights, precision, decoding options, version.

    What only changes speed or place (slots, lanes, actors, shard size, output URI) is left out on purpose.
    """
    generate = config.stages.generate
    return {
        "checkpoint.source": config.checkpoint.source,
        "checkpoint.revision": model_revision,
        "checkpoint.dtype": config.checkpoint.dtype,
        "stages.encode.window": config.stages.encode.window,
        "stages.generate.temperature": generate.temperature,
        "stages.generate.seed": generate.seed if generate.temperature > 0 else None,
        "stages.generate.alignment": generate.alignment,
        "version": version,
    }


def fingerprint(settings: dict[str, Any]) -> str:
    """16 hex digits naming a set of `decoding_settings`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}; complete examples are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected sections such as `checkpoint:` and `input:`")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"-s {override!r}: expected section.key=value, e.g. -s stages.generate.slots=8")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"-s {override!r}: the value is not valid YAML: {error}") from None
    here: Any = data
    for part in path[:-1]:
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
        if not isinstance(here, dict):
            raise ConfigError(f"-s {override!r}: {part} is a value, not a section")
    here[path[-1]] = value


def _explain(error: ValidationError, *, where: str) -> str:
    lines: list[str] = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            lines.append(f"{'.'.join(parts)}: unknown key; {_nearest(parts)}")
            continue
        key = ".".join(part for part in parts if part in _all_names() or part.isdigit())
        line = f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"
        if line not in lines:
            lines.append(line)
    return f"{where}: " + "\n".join(lines)


def _nearest(parts: Sequence[str]) -> str:
    section = _section_at(parts[:-1])
    siblings = list(section.model_fields) if section else []
    close = difflib.get_close_matches(parts[-1], siblings, n=1)
    if close:
        return f"did you mean {'.'.join([*parts[:-1], close[0]])}?"
    everywhere = difflib.get_close_matches(parts[-1], [path.rsplit(".", 1)[-1] for path in _all_paths()], n=1)
    for path in _all_paths():
        if everywhere and path.endswith(everywhere[0]):
            return f"did you mean {path}?"
    return f"known here: {', '.join(siblings)}"


def _section_at(parts: Sequence[str]) -> type[_Section] | None:
    section: type[_Section] = RunConfig
    for part in parts:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, _Section)):
            return None
        section = field.annotation
    return section


def _all_paths(section: type[_Section] = RunConfig, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            paths += _all_paths(field.annotation, f"{prefix}{name}.")
    return paths


def _all_names() -> set[str]:
    return {part for path in _all_paths() for part in path.split(".")}
