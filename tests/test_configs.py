"""The examples in `configs/` open, hold every key there is, and ask for what their names promise."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SOURCES = {"demo": "demo", "en-2.6b": "kyutai/stt-2.6b-en", "en_fr-1b": "kyutai/stt-1b-en_fr"}


def keys_of(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key a person may set, dotted."""
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


def keys_in(data: dict[str, Any], known: set[str], prefix: str = "") -> set[str]:
    """The known keys that are written out in a file; a dict that is itself a value is not entered."""
    keys: set[str] = set()
    for name, value in data.items():
        if prefix + name in known:
            keys.add(prefix + name)
        else:
            keys |= keys_in(value, known, f"{prefix}{name}.")
    return keys


def test_there_is_one_example_for_each_promised_name() -> None:
    assert {path.stem for path in CONFIGS} == set(SOURCES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_written_out(path: Path) -> None:
    known = keys_of(RunConfig)
    assert keys_in(yaml.safe_load(path.read_text()), known) == known


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_section_explains_itself(path: Path) -> None:
    paragraphs = path.read_text().split("\n\n")
    assert all("#" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_file_asks_for_the_model_it_is_named_after(path: Path) -> None:
    config = load_config(str(path))
    assert config.checkpoint.source == SOURCES[path.stem]
    assert config.input.uris
    assert config.output.uri


@pytest.mark.parametrize("name", ["en-2.6b", "en_fr-1b"])
def test_the_gpu_examples_change_nothing_but_model_and_places(name: str) -> None:
    config, defaults = load_config(str(ROOT / f"configs/{name}.yaml")), RunConfig()
    assert (config.stages, config.serve, config.ray) == (defaults.stages, defaults.serve, defaults.ray)
    assert config.checkpoint == defaults.checkpoint.model_copy(update={"source": SOURCES[name]})
    assert config.input == defaults.input.model_copy(update={"uris": config.input.uris})
    assert config.output == defaults.output.model_copy(update={"uri": config.output.uri})
    assert config.stages.encode.gpus + config.stages.generate.gpus <= 1


def test_the_demo_needs_neither_network_nor_gpu() -> None:
    config = load_config(str(ROOT / "configs/demo.yaml"))
    assert config.checkpoint.device == "cpu"
    assert config.stages.encode.gpus == config.stages.generate.gpus == 0
    assert config.ray.address is None
    assert all((ROOT / uri).is_dir() for uri in config.input.uris)
