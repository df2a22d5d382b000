"""What a person may ask for: YAML text and `-s key=value` overrides in, one frozen `RunConfig` out.

Every default lives here and nowhere else. A key nobody knows is refused with the nearest one that exists.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError
from pipeline.retries import shown

Alignment = Literal["all-frames", "bos-replaces-first", "first-frame-twice"]
Auto = Literal["auto"]
Precision = Literal["float32", "tf32", "bfloat16"]
PositiveInt = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
# Handed to fsspec as they are. Never logged, shown or written to the output: they may be secrets.
StorageOptions = Annotated[dict[str, Any], Field(repr=False)]


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("auto, cpu, cuda or cuda:N")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CheckpointConfig(_Section):
    """Which weights, and how they are held."""

    source: Text = "kyutai/stt-2.6b-en"  # hub id, local folder, fsspec URI, or `demo`
    revision: Text = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    storage_options: StorageOptions = {}  # of a URI as source


class InputConfig(_Section):
    """Where the audio is, and how much of it one output file holds."""

    uris: list[Text] = []  # an empty one would be the folder that the command runs in
    shard_audio_hours: float = Field(default=1.0, gt=0)
    max_audio_hours: float = Field(default=100.0, gt=0)  # of one input; a longer one gets the row TOO_LONG
    storage_options: StorageOptions = {}


class OutputConfig(_Section):
    """Where the transcripts go."""

    uri: str = ""
    columns: list[Literal["tokens", "codes", "audio"]] = []
    storage_options: StorageOptions = {}


class LoadConfig(_Section):
    """Decoding and resampling, on CPUs."""

    cpus: float = Field(default=1, gt=0)  # of one load actor
    actors: Auto | PositiveInt = "auto"  # per lane; auto: what the lane's share of the machine allows
    # What decoding may take beyond what its process has before it begins; an input that wants more gets an error row.
    memory_gib: float = Field(default=4.0, gt=0)
    # A loader that gives nothing for so long, and a second more per megabyte to fetch, is killed; an input over which
    # that happens twice gets the row DECODE_TIMEOUT.
    stall_seconds: float = Field(default=600.0, gt=0)


class EncodeConfig(_Section):
    """Audio to Mimi codes."""

    gpus: float = Field(default=0.2, ge=0)
    # exact: every latent sees the whole window.
    # ring: moshi's streaming encoder, where the first latent of a frame sees one less.
    window: Literal["exact", "ring"] = "exact"
    # Streams side by side in one call. auto: 1 on a CPU, which one stream keeps busy, 16 on a GPU.
    rows: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    # Audio of a stream encoded in one call; bounds memory. auto: 10 with one row, 2 with more. It and rows decide how
    # sums are grouped: a code that was nearly a tie may fall the other way, in 1 of 2,000 frames of random weights.
    piece_seconds: Auto | Annotated[float, Field(gt=0, le=3600)] = "auto"
    # Of everything before the quantizer. float32: strict, also where torch would take TF32. Others give other codes.
    precision: Precision = "float32"


class GenerateConfig(_Section):
    """Codes to text tokens."""

    gpus: float = Field(default=0.8, ge=0)
    slots: Auto | PositiveInt = "auto"  # streams that share one pass over the weights
    # Frames of a stream per pass, guessed and verified: changes speed, never a token. auto: what paid when measured.
    lookahead: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
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
        """The complete config, defaults included; `storage_options` and passwords in URIs are hidden."""
        data = self.model_dump(mode="json")
        for section in ("checkpoint", "input", "output"):
            options: dict[str, Any] = data[section]["storage_options"]
            data[section]["storage_options"] = dict.fromkeys(options, "***")
        data["checkpoint"]["source"] = shown(self.checkpoint.source)
        data["input"]["uris"] = [shown(uri) for uri in self.input.uris]
        data["output"]["uri"] = shown(self.output.uri)
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


def require_output_uri(config: RunConfig) -> str:
    """Where the transcripts go.

    Raises:
        ConfigError: the config does not say.
    """
    if not config.output.uri:
        raise ConfigError("output.uri is empty: say where the transcripts go, a folder or a URI like s3://bucket/out")
    return config.output.uri


def decoding_settings(config: RunConfig, *, dtype: str, model_revision: str, version: str) -> dict[str, Any]:
    """Everything that can change a transcript: weights, precision, decoding options, version.

    What only changes speed or place (slots, rows, lanes, actors, shard size, output URI) is left out on purpose.
    """
    generate = config.stages.generate
    settings = {
        "checkpoint.source": shown(config.checkpoint.source),
        "checkpoint.revision": model_revision,
        "checkpoint.dtype": dtype,  # as resolved: `auto` is another one on another device
        "stages.encode.window": config.stages.encode.window,
        "stages.generate.temperature": generate.temperature,
        "stages.generate.seed": generate.seed if generate.temperature > 0 else None,
        "stages.generate.alignment": generate.alignment,
        "version": version,
    }
    # float32 goes without saying, as it did before there was a choice: fingerprints of earlier runs stay what they are.
    if config.stages.encode.precision != "float32":
        settings["stages.encode.precision"] = config.stages.encode.precision
    return settings


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
        data = yaml.load(text, _NoDuplicates)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 looks like a date
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected sections such as `checkpoint:` and `input:`")
    return _without_empty_sections(data, RunConfig)


class _NoDuplicates(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; here the first would be an option that is ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the loader does it, refusing a key that comes twice."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _without_empty_sections(data: Mapping[str, Any], section: type[_Section]) -> dict[str, Any]:
    """A section whose every line is a comment reads as null; it means the defaults."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        inner = _section_at([name], section)
        if inner is None:
            kept[name] = value
        elif value is not None:
            kept[name] = _without_empty_sections(value, inner) if isinstance(value, Mapping) else value
    return kept


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"-s {override!r}: expected section.key=value, e.g. -s stages.generate.slots=8")
    try:
        value = yaml.load(text, _NoDuplicates) if text.strip() else ""
    except (yaml.YAMLError, ValueError) as error:
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
    """One line per key: what was expected there and what was found."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            lines.append(f"{'.'.join(parts)}: unknown key; {_nearest(parts)}")
            continue
        # The other parts of a location name the member of a union that was tried.
        key = ".".join(part for part in parts if part in _all_names() or part.isdigit()) or ".".join(parts)
        expected.setdefault(key, []).append(_expectation(problem["type"], problem["msg"], problem["input"]))
        found[key] = problem["input"]
    lines += [
        f"{key}: expected {', or '.join(dict.fromkeys(texts))}; found {_shown(key, found[key])}"
        for key, texts in expected.items()
    ]
    return f"{where}: " + "\n  ".join(lines)


def _shown(key: str, value: Any) -> str:
    """What was found, unless it may be a secret that was put in the wrong shape."""
    is_secret = any(part in ("storage_options", "api_keys") for part in key.split("."))
    return f"a {type(value).__name__}" if is_secret else repr(value)


def _expectation(kind: str, message: str, value: Any) -> str:
    """What pydantic expected, in the words of a YAML file."""
    if kind == "model_type":
        return "a section, with its keys indented below it"
    if kind == "list_type":
        return "a list, e.g. [a, b]"
    if kind == "string_type" and not isinstance(value, (Mapping, Sequence)):
        return "text; put it in quotes"
    if kind == "invalid_key":
        return "names as keys"
    text = re.sub(r"^(Value error, |\w+ should (be|have) )", "", message)
    text = re.sub(r"^(greater|less)", r"a number \1", text)
    return text.removesuffix(", unable to parse string as an integer")


def _nearest(parts: Sequence[str]) -> str:
    section = _section_at(parts[:-1])
    siblings = list(section.model_fields) if section else []
    close = difflib.get_close_matches(parts[-1], siblings, n=1)
    if close:
        return f"did you mean {'.'.join([*parts[:-1], close[0]])}?"
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(_all_paths())}
    close = difflib.get_close_matches(parts[-1], elsewhere, n=1)
    if close:
        return f"did you mean {elsewhere[close[0]]}?"
    return f"known here: {', '.join(siblings)}"


def _section_at(parts: Sequence[str], section: type[_Section] | None = None) -> type[_Section] | None:
    """The section at the end of a path that begins in `section`; None if the path leads elsewhere."""
    section = section or RunConfig
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
