"""A folder of files -> a checked `Checkpoint` -> the decoder, the Mimi encoder, the tokenizer.

Only safetensors are read, never pickles. Every tensor is checked by name, shape and kind before anything is built.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.config import (
    RELEASED_MIMI,
    DecoderConfig,
    Format,
    FormatError,
    MimiConfig,
    SpeechConfig,
    decoder_config_from_original,
    decoder_config_from_trfs,
    mimi_config_from_original,
    mimi_config_from_trfs,
    speech_config_from_original,
    speech_config_from_trfs,
)
from models.decoder import Decoder
from models.memory import Window
from models.mimi import MimiEncoder
from models.names import (
    Rule,
    decoder_rules_original,
    decoder_rules_trfs,
    is_not_needed,
    mimi_rules_original,
    mimi_rules_trfs,
)
from models.tokenizer import Tokenizer, load_tokenizer

Module = TypeVar("Module", bound=nn.Module)

_FEW_PIECES = 8
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a folder holds, read from its JSON files; no tensor has been touched yet."""

    format: Format
    decoder: DecoderConfig
    mimi: MimiConfig
    speech: SpeechConfig
    decoder_files: tuple[Path, ...]
    mimi_files: tuple[Path, ...]
    tokenizer_file: Path

    def load_decoder(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Build the decoder and fill it.

        Raises:
            FormatError: a tensor is missing, left over, or of the wrong shape or kind; all of them are named.
        """
        rules = decoder_rules_original if self.format == "original" else decoder_rules_trfs
        return _fill(
            lambda: Decoder(self.decoder), rules(self.decoder), self.decoder_files, device, dtype, self._others
        )

    def load_mimi(self, *, device: torch.device | str = "cpu", window: Window = "exact") -> MimiEncoder:
        """Build the Mimi encoder and fill it, always in float32: codes made in less are other codes.

        Raises:
            FormatError: as for `load_decoder`.
        """
        rules = mimi_rules_original if self.format == "original" else mimi_rules_trfs
        build = lambda: MimiEncoder(self.mimi, window=window)  # noqa: E731
        return _fill(build, rules(self.mimi), self.mimi_files, device, torch.float32, self._others)

    def load_tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
            FormatError: the file is not a tokenizer, or has another number of pieces than the decoder has text ids.
        """
        special = {self.speech.padding_id, self.speech.word_start_id}
        try:
            tokenizer = load_tokenizer(self.tokenizer_file, special_ids=special)
        except (OSError, RuntimeError, ValueError) as error:
            raise FormatError(f"{self.tokenizer_file} is not a tokenizer: {error}") from None
        # Converted tokenizers may count a BOS or other ids that are never emitted; one of another model is far off.
        if abs(tokenizer.num_pieces - self.decoder.text_card) > _FEW_PIECES:
            raise FormatError(
                f"{self.tokenizer_file} has {tokenizer.num_pieces} pieces, "
                f"but the decoder has {self.decoder.text_card} text ids"
            )
        return tokenizer

    def _others(self, name: str) -> bool:
        """Whether a tensor belongs to the other half of a file that holds both."""
        return is_not_needed(name) or (self.format == "trfs")

    def check_tensors(self) -> None:
        """Check names, shapes and kinds of all tensors of all files, reading only their headers.

        Raises:
            FormatError: naming everything that is missing, left over or wrong.
        """
        if self.format == "original":
            _check(decoder_rules_original(self.decoder), _headers(self.decoder_files), is_not_needed)
            _check(mimi_rules_original(self.mimi), _headers(self.mimi_files), is_not_needed)
        else:
            rules = decoder_rules_trfs(self.decoder) + mimi_rules_trfs(self.mimi)
            _check(rules, _headers(self.decoder_files), is_not_needed)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Recognise the format of a checkpoint folder, read its JSON files and check every tensor's header.

    Raises:
        FormatError: a file is missing or unreadable, or it is not a speech-to-text checkpoint; the message says which
            file or tensor, what was found and what was expected.
    """
    root = Path(folder)
    config = _read_json(root, "config.json")
    try:
        checkpoint = _open_trfs(root, config) if "codec_config" in config else _open_original(root, config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"a value in the JSON files of {root} is not of the kind it should be: {error}") from None
    checkpoint.check_tensors()
    return checkpoint


def checkpoint_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """File names (globs allowed) that a repository with this `config.json` must be asked for."""
    if "codec_config" in config:
        return ("*.safetensors", "model.safetensors.index.json", "tokenizer*", "*_config.json", "config.json")
    names = [config.get("moshi_name") or "model.safetensors"]
    names += [config[key] for key in ("mimi_name", "mimi_config_name") if config.get(key)]
    names.append(config.get("tokenizer_name") or "tokenizer.model")
    return ("config.json", *names)


def _open_original(root: Path, config: Mapping[str, Any]) -> Checkpoint:
    if "text_card" not in config or "mimi_name" not in config:
        raise FormatError(
            f"{root / 'config.json'} is neither an original Kyutai config (text_card, mimi_name, ...) nor a -trfs one "
            f"(codec_config, ...); its keys are {', '.join(sorted(config))}"
        )
    decoder = decoder_config_from_original(config)
    mimi_name = config.get("mimi_config_name")
    mimi = _read_json(root, mimi_name) if mimi_name else RELEASED_MIMI
    return Checkpoint(
        format="original",
        decoder=decoder,
        mimi=mimi_config_from_original(mimi, num_codebooks=decoder.num_codebooks),
        speech=speech_config_from_original(config),
        decoder_files=(_existing(root, config.get("moshi_name") or "model.safetensors"),),
        mimi_files=(_existing(root, config["mimi_name"]),),
        tokenizer_file=_existing(root, config.get("tokenizer_name") or "tokenizer.model"),
    )


def _open_trfs(root: Path, config: Mapping[str, Any]) -> Checkpoint:
    decoder = decoder_config_from_trfs(config)
    has_generation = (root / "generation_config.json").exists()
    generation = _read_json(root, "generation_config.json") if has_generation else {}
    files = _trfs_weights(root)
    tokenizer = root / "tokenizer.json"
    return Checkpoint(
        format="trfs",
        decoder=decoder,
        mimi=mimi_config_from_trfs(config["codec_config"], num_codebooks=decoder.num_codebooks),
        speech=speech_config_from_trfs(config, _read_preprocessor(root), generation),
        decoder_files=files,
        mimi_files=files,
        tokenizer_file=tokenizer
        if tokenizer.exists()
        else _existing(root, "tokenizer.model", or_else="tokenizer.json"),
    )


def _read_preprocessor(root: Path) -> dict[str, Any]:
    """The feature extractor's settings; transformers 5 saves them inside `processor_config.json`."""
    if not (root / "preprocessor_config.json").exists() and (root / "processor_config.json").exists():
        return _read_json(root, "processor_config.json").get("feature_extractor") or {}
    return _read_json(root, "preprocessor_config.json")


def _trfs_weights(root: Path) -> tuple[Path, ...]:
    if not (root / "model.safetensors.index.json").exists():
        return (_existing(root, "model.safetensors", or_else="model.safetensors.index.json and its shards"),)
    index = _read_json(root, "model.safetensors.index.json")
    return tuple(_existing(root, name) for name in sorted(set(index.get("weight_map", {}).values())))


def _existing(root: Path, name: str, *, or_else: str = "") -> Path:
    path = root / name
    if not path.is_file():
        present = ", ".join(sorted(entry.name for entry in root.iterdir())) if root.is_dir() else "no such folder"
        alternative = f" (or {or_else})" if or_else else ""
        raise FormatError(f"checkpoint file {path}{alternative} is missing; the folder holds: {present or 'nothing'}")
    return path


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = _existing(root, name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    file: Path
    shape: tuple[int, ...]
    kind: str


def _headers(files: Sequence[Path]) -> dict[str, _Header]:
    found: dict[str, _Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    part = tensors.get_slice(name)
                    found[name] = _Header(file=file, shape=tuple(part.get_shape()), kind=part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{file} is not a whole safetensors file: {error}") from None
    return found


def _check(rules: Sequence[Rule], headers: Mapping[str, _Header], may_be_left: Callable[[str], bool]) -> None:
    wanted = {name: shape for rule in rules for name, shape in rule.sources}
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in headers]
    for name, header in headers.items():
        if name in wanted and header.shape != wanted[name]:
            problems.append(f"wrong shape: {name} is {list(header.shape)}, expected {list(wanted[name])}")
        elif name in wanted and header.kind not in _FLOATS:
            problems.append(f"wrong dtype: {name} is {header.kind}, expected one of {', '.join(sorted(_FLOATS))}")
        elif name not in wanted and not may_be_left(name):
            problems.append(f"left over: {name} {list(header.shape)}")
    if problems:
        files = ", ".join(sorted({str(header.file) for header in headers.values()}))
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise FormatError(f"{files} does not hold the model that its config describes:\n  " + "\n  ".join(shown))


def _fill(
    build: Callable[[], Module],
    rules: Sequence[Rule],
    files: Sequence[Path],
    device: torch.device | str,
    dtype: torch.dtype,
    may_be_left: Callable[[str], bool],
) -> Module:
    headers = _headers(files)
    _check(rules, headers, may_be_left)
    with torch.device("meta"):
        module = build()
    state: dict[str, Tensor] = {}
    handles = {file: safe_open(file, framework="pt") for file in files}
    for rule in rules:
        stored = [handles[headers[name].file].get_tensor(name) for name, _ in rule.sources]
        # A copy of its own for every parameter: slices of a large table must not keep the table alive.
        state[rule.target] = rule.build(stored).to(device=device, dtype=dtype, copy=True).contiguous()
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
